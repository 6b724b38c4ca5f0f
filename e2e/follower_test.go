package e2e

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestFollowerComesBackThroughAnImage cuts a follower off until the others have
// truncated the log it needs, and cuts the transfer of the image several times.
// Goal: each time the transfer goes on where it stopped, the follower catches
// up, and the cluster serves all the while. Method: links slow enough to be cut
// in the middle, found by watching what has arrived; histories and state hashes.
func TestFollowerComesBackThroughAnImage(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Proxied: true, Args: smallLog()})
	victim := c.Followers(c.Leader())[0]
	var rest []*Node
	for _, n := range c.Nodes {
		if n != victim {
			rest = append(rest, n)
		}
	}
	load := StartLoad(c, LoadOptions{Seed: seed, Clients: 6})
	const imageBytes = 24 << 20
	c.Isolate(victim)
	fill := NewFiller(t, "image", 512<<10)
	fill.Fill(imageBytes, imageBytes/(512<<10), rest...)
	fill.Fill(lagBytes, 8, rest...)
	for _, n := range rest {
		c.Link(n, victim).Delay(8 * time.Millisecond)
	}
	images := filepath.Join(victim.DataDir, "images")
	var held int64
	for cut := range 3 {
		c.Heal()
		want := held + 3<<20
		eventually(t, 60*time.Second, fmt.Sprintf("more than %d bytes of the image arrive", want), func(context.Context) error {
			id, n := partial(t, images)
			if n < want {
				return fmt.Errorf("%d bytes of %q", n, id)
			}
			held = n
			return nil
		})
		c.Isolate(victim)
		id, now := partial(t, images)
		if now < held {
			t.Fatalf("after cut %d only %d bytes of the %d that had arrived are left (%q)", cut, now, held, id)
		}
		held = now
		t.Logf("cut %d with %d bytes of %s", cut+1, now, id)
	}
	for _, n := range rest {
		c.Link(n, victim).Delay(0)
	}
	c.Heal()
	eventually(t, 60*time.Second, "the image is installed", func(context.Context) error {
		if !strings.Contains(victim.Log(), "event=image_installed") {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	c.WaitServing(c.Nodes...)
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)
	fill.Check(c.Nodes...)
	c.WaitSameState()
	t.Logf("longest time without an acknowledged write: %v", load.LongestGap())
}

// partial returns the image that is being received and how much of it is on
// disk; none is no bytes.
func partial(t *testing.T, images string) (id string, bytes int64) {
	t.Helper()
	_ = filepath.WalkDir(images, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // files come and go while the node works
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".receiving-") {
			id = strings.TrimPrefix(d.Name(), ".receiving-")
		}
		if info, err := d.Info(); err == nil && !d.IsDir() && strings.Contains(path, ".receiving-") {
			bytes += info.Size()
		}
		return nil
	})
	return id, bytes
}

// TestLostStateBehindATruncatedLog removes the state and the images of a node
// whose log no longer reaches back to its beginning. Goal: at its start it gets
// an image from a peer, while the cluster serves, and then goes on from its log.
// Method: the same under load, with histories and state hashes.
func TestLostStateBehindATruncatedLog(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Args: smallLog()})
	fill := NewFiller(t, "state", 256<<10)
	fill.Fill(lagBytes, 16, c.Nodes...)
	load := StartLoad(c, LoadOptions{Seed: seed, Clients: 6})
	victim := c.Followers(c.Leader())[0]
	victim.Kill()
	for _, dir := range []string{"state", "images"} {
		if err := os.RemoveAll(filepath.Join(victim.DataDir, dir)); err != nil {
			t.Fatal(err)
		}
	}
	victim.Start()
	c.WaitServing(victim)
	for _, event := range []string{"event=fetch_state", "event=state_fetched"} {
		if !strings.Contains(victim.Log(), event) {
			t.Errorf("the node came back without %s: its log was not truncated, or its state not fetched", event)
		}
	}
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)
	fill.Check(c.Nodes...)
	c.WaitSameState()
}
