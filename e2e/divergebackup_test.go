package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// storedBackup is what a test reads of the description of a backup.
type storedBackup struct {
	BackupID    string `json:"backup_id"`
	CommitIndex uint64 `json:"commit_index"`
	StateAgreed bool   `json:"state_agreed"`
}

// storedBackups returns the descriptions of the backups in a directory.
func storedBackups(t *testing.T, dir string) (all []storedBackup) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*", "metadata.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var one storedBackup
		if err := json.Unmarshal(raw, &one); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		all = append(all, one)
	}
	return all
}

// TestDivergedLeaderStoresNoBackup lets the leader apply one entry wrongly just before
// a backup is due that it makes by itself. Goal: no backup of the wrong state is
// stored, though nobody knows yet that it is wrong; the next leader makes one, and it
// says that a majority held that state. Method: members compare their states every
// ten seconds only, unless somebody asks.
func TestDivergedLeaderStoresNoBackup(t *testing.T) {
	dest := t.TempDir()
	schedule := []string{"--backup-every", "1h", "--backup-to", "file://" + dest}
	c := NewCluster(t, Options{Binary: crashBinary(t), Args: []string{"--check-interval", "10s"}})
	victim := c.Nodes[0]
	others := c.Nodes[1:]
	victim.args = append(victim.args, schedule...)
	// The first backup is due as soon as a node with a schedule leads.
	c.makeLeader(others[0])
	victim.Stop()
	victim.Start(fmt.Sprintf("CONVEYOR_DIVERGE_AT=%d", statusOf(t, others[0]).AppliedIndex+20))
	c.WaitServing(victim)
	c.makeLeader(victim)
	fill := NewFiller(t, "fill", 1<<10)
	fill.Fill(64<<10, 4, c.Nodes...)
	c.says(victim, "diverged at index", 30*time.Second)
	at := regexp.MustCompile(`diverged at index (\d+)`).FindStringSubmatch(victim.Log())
	wrong, err := strconv.ParseUint(at[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	c.says(victim, "event=rebuilt", 60*time.Second)
	c.WaitServing(c.Nodes...)
	for _, b := range storedBackups(t, dest) {
		if b.CommitIndex >= wrong {
			t.Errorf("backup %s is of entry %d; the state of its node was wrong from %d on", b.BackupID, b.CommitIndex, wrong)
		}
	}
	// The node is right again. Its backup is made, now or after the pause behind the
	// one that failed, and proven.
	for _, n := range others {
		n.Stop()
		n.args = append(n.args, schedule...)
		n.Start()
		c.WaitServing(n)
	}
	eventually(t, 150*time.Second, "a backup is stored", func(ctx context.Context) error {
		for _, b := range storedBackups(t, dest) {
			if !b.StateAgreed {
				t.Fatalf("backup %s does not say that its state was compared", b.BackupID)
			}
			if b.CommitIndex > wrong {
				return nil
			}
		}
		list, err := others[0].Cluster().ListOperations(ctx, &clusterpb.ListOperationsRequest{Kind: "backup"})
		return errors.Join(fmt.Errorf("%v", list.GetOperations()), err)
	})
	c.WaitSameState()
	c.forgot(victim)
}
