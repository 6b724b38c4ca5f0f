package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/backuppb"
)

const (
	// tidyTime bounds what is done after the real work, or after Ctrl-C.
	tidyTime = 10 * time.Second
)

func newBackupCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "backup",
		Aliases: []string{"backups"},
		Short:   "Copy the state out of a running cluster, and back into it",
		Long: `Copy the state out of a running cluster, and back into it, while clients go on
reading and writing.

A backup lies in a store: a directory (file:///backups, or a bare path), or
s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix. It is
ID/checkpoint.tar.zst with ID/metadata.json beside it; without the latter there is
no backup. Commands that are given no store work on the snapshots that lie on the
nodes of the cluster themselves.

Credentials are found where the tools of each vendor find them, never in the URL:
  s3      AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, a web identity
          or the role of the machine; the region from AWS_REGION or ?region=.
          Other servers that speak S3:
          s3://bucket/prefix?endpoint=http://minio:9000&use_path_style=true&region=any
  gs      GOOGLE_APPLICATION_CREDENTIALS or the account of gcloud or the machine
  azblob  AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN

--timeout is for one answer of the cluster; how long the bytes of a backup take is
not limited. A transfer that breaks goes on, on another node of --server if need
be, and is given up when nothing has moved for --patience.

To make a new cluster from a backup, or a backup of a node that does not run, use
'router snapshot'.

Of the exit codes ('router help exit-codes'): 3 no such backup, 4 there is one already or
another restore runs, 5 no node answered, 7 a deadline passed (outcome unknown, or
the restore goes on), 8 the backup is damaged, or the restore failed and nothing was
changed.`,
	}
	cmd.AddCommand(newBackupCreateCommand(a), newBackupListCommand(a), newBackupDescribeCommand(a), newBackupVerifyCommand(a),
		newBackupRestoreCommand(a), newBackupDeleteCommand(a), newBackupCleanupCommand(a), newUndoRestoreCommand(a))
	return cmd
}

// hostPort is what may be meant for a node where a store is expected.
var hostPort = regexp.MustCompile(`^(https?://)?[A-Za-z0-9.-]+:[0-9]+(,.*)?$`)

// placeFlag is the value of --dest and --source.
type placeFlag struct{ text string }

func (p *placeFlag) String() string { return p.text }
func (p *placeFlag) Type() string   { return "url" }

// Set refuses what looks like a node: in these commands -s is the store, as
// existing tools have it, and elsewhere the server.
func (p *placeFlag) Set(text string) error {
	if p.text != "" {
		return errors.New("given twice")
	}
	if hostPort.MatchString(text) {
		return errors.New("that is a node, not a place of backups; name nodes by --server (-s is the store in the backup commands)")
	}
	// Whether it is a location is found out when it is opened: the message for
	// a flag would repeat a password that somebody has put into it.
	p.text = text
	return nil
}

// storeFlags adds the flags that name a store. Existing tools call it --dest where
// backups are made and cleaned up, and --source where they are read; each command
// takes both names, so that nobody has to remember which is which. In all of
// these commands -s is the store: --server keeps its long name, and no letter has
// two meanings.
func (a *app) storeFlags(cmd *cobra.Command, p *placeFlag, help string) {
	cmd.Flags().VarP(p, "dest", "d", help)
	cmd.Flags().VarP(p, "source", "s", "the same as --dest (-s is not --server in the backup commands)")
	a.serverFlag(cmd)
}

// serverFlag is --server without its letter.
func (a *app) serverFlag(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar(&a.servers, "server", a.servers, "client addresses (host:port) of one or more nodes; env CONVEYOR_ROUTER_SERVER")
}

func (a *app) patienceFlag(cmd *cobra.Command, d *time.Duration) {
	cmd.Flags().DurationVar(d, "patience", time.Minute, "give a transfer up when nothing has moved for so long")
}

// nodesFlag is --router or --target, existing names of --server.
type nodesFlag struct{ nodes []string }

func (n *nodesFlag) String() string { return strings.Join(n.nodes, ",") }
func (n *nodesFlag) Type() string   { return "nodes" }

func (n *nodesFlag) Set(text string) error {
	nodes, err := nodeAddresses(strings.Split(text, ","))
	n.nodes = append(n.nodes, nodes...)
	return err
}

// slow bounds a call that reads or writes the whole state: by --timeout only
// when somebody has set it.
func (a *app) slow(cmd *cobra.Command, ctx context.Context) (context.Context, context.CancelFunc) {
	if cmd.Flags().Changed("timeout") {
		return a.quick(ctx)
	}
	return context.WithTimeout(ctx, slowCall)
}

// tidy is for what must be done although ctx may have ended.
func tidy(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), tidyTime)
}

// progress shows how far something is, on stderr: bars on a terminal, lines
// elsewhere, and nothing where a program reads the result.
func (a *app) progress(title string, inBytes bool) *output.Progress {
	mode := output.LineProgress
	f, terminal := a.stderr.(*os.File)
	if terminal && term.IsTerminal(int(f.Fd())) && a.getenv("TERM") != "dumb" {
		mode = output.BarProgress
	}
	if a.format != output.Table {
		mode = output.NoProgress
	}
	p := output.NewProgress(a.stderr, mode, title, inBytes)
	if mode == output.BarProgress {
		p.Fit(func() int {
			columns, _, err := term.GetSize(int(f.Fd()))
			if err != nil {
				return 0
			}
			return columns
		})
	}
	a.showing.Lock()
	a.shown = p
	a.showing.Unlock()
	return p
}

// noteKept says that a snapshot was left on a node.
func (a *app) noteKept(id string, err error) {
	if err != nil {
		fmt.Fprintf(a.stderr, "Warning: snapshot %s stays on its node: %v\n", output.Clean(id), err)
	}
}

// withStore opens a store for one command.
func withStore(ctx context.Context, place string, create bool, use func(*backup.Store) error) error {
	open := backup.Open
	if create {
		open = backup.Create
	}
	s, err := open(ctx, place)
	if err != nil {
		return err
	}
	return errors.Join(use(s), s.Close())
}

var compressions = map[archive.Compression]backuppb.CompressionType{
	archive.None: backuppb.CompressionType_COMPRESSION_NONE,
	archive.Gzip: backuppb.CompressionType_COMPRESSION_GZIP,
	archive.Zstd: backuppb.CompressionType_COMPRESSION_ZSTD,
}
