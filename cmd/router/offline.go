package main

import (
	"errors"
	"io"
	"log/slog"

	"github.com/spf13/cobra"
)

// dataDirFlag adds the --data-dir of a command that works on a directory
// without a node.
func dataDirFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "data-dir", "", "data directory of a node (required)")
	_ = cmd.MarkFlagDirname("data-dir")
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if *dir == "" {
			return usageError{cmd, errors.New("--data-dir is missing: name the data directory of the node")}
		}
		return nil
	}
}

// quietLogger tells what a tool should not keep to itself, and nothing else.
func quietLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelWarn}))
}
