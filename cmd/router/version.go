package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/server"
)

func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this binary",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			b := server.ReadBuild()
			if a.format != output.Table {
				return output.Document(a.stdout, a.format, b)
			}
			fmt.Fprintf(a.stdout, "router %s (%s, %s)\n", b.Version, b.Revision, b.Go)
			return nil
		},
	}
}
