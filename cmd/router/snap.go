package main

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"conveyor.etl/router/offline"
	"conveyor.etl/router/output"
)

func newSnapCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snap",
		Short: "Look at the images of the state in a data directory",
		Long: `Look at the images of the state in a data directory: those made for other nodes
and those kept as backups. Images never change and the commands only read, so the
node may run meanwhile.`,
	}
	cmd.AddCommand(newSnapListCommand(a), newSnapCheckCommand(a))
	return cmd
}

// imageRow is an image in documents.
type imageRow struct {
	Place   string    `json:"place"`
	ID      string    `json:"id"`
	Index   uint64    `json:"index,omitempty"`
	Term    uint64    `json:"term,omitempty"`
	Created time.Time `json:"created,omitzero"`
	Files   int       `json:"files"`
	Bytes   int64     `json:"bytes"`
	State   string    `json:"state"`
	Problem string    `json:"problem,omitempty"`
}

func rowOf(im *offline.Image, good string) imageRow {
	r := imageRow{Place: im.Place, ID: im.Name, Index: im.Info.Index, Term: im.Info.Term,
		Files: len(im.Info.Files), Bytes: im.Info.Bytes, State: good}
	if !im.Info.Created.IsZero() {
		r.Created = im.Info.Created.UTC()
	}
	if im.Err != nil {
		r.State, r.Problem = "damaged", im.Err.Error()
	}
	return r
}

func (a *app) printImages(rows []imageRow) error {
	return output.Print(a.stdout, a.format, rows, func() *output.Grid {
		g := &output.Grid{Header: []string{"FOLDER", "IMAGE", "INDEX", "TERM", "CREATED", "FILES", "BYTES", "STATE"}}
		for _, r := range rows {
			created := ""
			if !r.Created.IsZero() {
				created = r.Created.Format(time.RFC3339)
			}
			g.Add(r.Place, r.ID, r.Index, r.Term, created, r.Files, r.Bytes, r.State)
		}
		return g
	})
}

func newSnapListCommand(a *app) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "list --data-dir DIR",
		Short: "List the images, by their manifests",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := offline.ListImages(dir)
			if err != nil {
				return err
			}
			rows := make([]imageRow, 0, len(images))
			for i := range images {
				rows = append(rows, rowOf(&images[i], "listed"))
			}
			return a.printImages(rows)
		},
	}
	dataDirFlag(cmd, &dir)
	return cmd
}

func newSnapCheckCommand(a *app) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "check --data-dir DIR [IMAGE]",
		Short: "Compare every byte of the images with their checksums; exit code 8 when one differs",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := offline.ListImages(dir)
			if err != nil {
				return err
			}
			rows := make([]imageRow, 0, len(images))
			found, damaged := 0, 0
			for _, im := range images {
				if len(args) == 1 && im.Name != args[0] {
					continue
				}
				if err := cmd.Context().Err(); err != nil {
					return err
				}
				im, gone := offline.CheckImage(im)
				if gone {
					continue
				}
				if found++; im.Err != nil {
					damaged++
					fmt.Fprintf(a.stderr, "%s: %v\n", filepath.Join(im.Place, im.Name), im.Err)
				}
				rows = append(rows, rowOf(&im, "intact"))
			}
			if len(args) == 1 && found == 0 {
				return notFound("%s holds no image %q", dir, args[0])
			}
			if err := a.printImages(rows); err != nil {
				return err
			}
			if damaged > 0 {
				return checkFailed(fmt.Errorf("%d of %d images are damaged; delete them, they can be made again", damaged, found))
			}
			return nil
		},
	}
	dataDirFlag(cmd, &dir)
	return cmd
}
