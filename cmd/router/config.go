package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"conveyor.etl/router/config"
	"conveyor.etl/router/output"
)

// loadConfig reads the settings of a node from all their sources.
func loadConfig(cmd *cobra.Command, a *app) (*config.Loaded, error) {
	return config.Load(configInput(cmd, a))
}

func configInput(cmd *cobra.Command, a *app) config.Input {
	hostname, err := os.Hostname()
	if err != nil {
		hostname = "" // only improves a derived address
	}
	return config.Input{
		Flags: cmd.Flags(), Environ: a.environ, Search: config.SearchPath(), Hostname: hostname,
	}
}

func newConfigCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Explain and check the settings of a node"}
	cmd.AddCommand(newConfigExplainCommand(a), newConfigCheckCommand(a), newConfigDefaultCommand(a))
	return cmd
}

func newConfigExplainCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain",
		Short: "Show every setting serve would use and where its value comes from",
		Long: `Show every setting 'router serve' would use with the same flags, environment and
file, and where its value comes from. Settings that serve would refuse are shown
with what is wrong, and the exit code is 8.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			values, faults := config.Explain(configInput(cmd, a))
			type row struct {
				Key    string `json:"key"`
				Value  string `json:"value"`
				Source string `json:"source"`
				Note   string `json:"note,omitempty"`
				Fault  string `json:"fault,omitempty"`
			}
			var rows []row
			for _, v := range values {
				rows = append(rows, row{v.Key, v.Value, v.Source, v.Note, v.Fault})
			}
			err := output.Print(a.stdout, a.format, rows, func() *output.Grid {
				g := &output.Grid{Header: []string{"KEY", "VALUE", "SOURCE", "NOTE"}}
				for _, r := range rows {
					note := ""
					switch {
					case r.Fault != "":
						note = "WRONG: " + r.Fault
					case r.Note != "":
						note = "no effect: " + r.Note
					}
					g.Add(r.Key, r.Value, r.Source, note)
				}
				return g
			})
			if err == nil && len(faults) > 0 {
				return checkFailed(faults)
			}
			return err
		},
	}
	config.AddFlags(cmd.Flags())
	return cmd
}

func newConfigCheckCommand(a *app) *cobra.Command {
	type checked struct {
		Valid bool `json:"valid"`
		// File is the file that was read; empty when there was none.
		File   string   `json:"file,omitempty"`
		Faults []string `json:"faults,omitempty"`
	}
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the settings without starting a node; exit code 8 when they have faults",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			loaded, err := loadConfig(cmd, a)
			if err != nil {
				var faults config.Faults
				if !errors.As(err, &faults) {
					return err
				}
				if a.format != output.Table {
					result := checked{}
					for _, f := range faults {
						result.Faults = append(result.Faults, f.String())
					}
					if err := output.Document(a.stdout, a.format, result); err != nil {
						return err
					}
				}
				return checkFailed(faults)
			}
			if a.format != output.Table {
				return output.Document(a.stdout, a.format, checked{Valid: true, File: loaded.File})
			}
			file := loaded.File
			if file == "" {
				file = "no file"
			}
			fmt.Fprintf(a.stdout, "the configuration is valid (%s)\n", file)
			return nil
		},
	}
	config.AddFlags(cmd.Flags())
	return cmd
}

func newConfigDefaultCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "default",
		Short: "Print a configuration file with every setting, its meaning and its default",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return config.WriteTemplate(a.stdout) },
	}
}
