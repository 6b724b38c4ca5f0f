package wal

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path/filepath"

	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// DumpOptions select and format what Dump prints.
type DumpOptions struct {
	// EntryFormatter turns an entry's payload into one line of text. Nil prints
	// its size and its first bytes.
	EntryFormatter func(*raftpb.Entry) string
	// From and To bound the indexes of entries printed; To 0 = no bound. Other
	// records are always printed.
	From, To uint64
}

// Dump prints every record of the log in dir in file order: also entries that a
// later record overwrote, and what lies behind damage, as far as it can be made
// out. It changes and locks nothing and works on the log of a running node. The
// error is about dir or w; damage is part of the text, use Verify to judge it.
func Dump(w io.Writer, dir string, o DumpOptions) error {
	segs, err := listSegments(dir)
	if err != nil {
		return fmt.Errorf("wal: dump: %w", err)
	}
	if len(segs) == 0 {
		return fmt.Errorf("wal: dump: %s holds no segment: %w", dir, fs.ErrNotExist)
	}
	if o.To == 0 {
		o.To = math.MaxUint64
	}
	if o.EntryFormatter == nil {
		o.EntryFormatter = formatPayload
	}
	d := dumper{w: bufio.NewWriter(w), o: o}
	for i, seg := range segs {
		if i > 0 && seg.seq != segs[i-1].seq+1 {
			fmt.Fprintf(d.w, "!! segments %d to %d are missing\n", segs[i-1].seq+1, seg.seq-1)
			d.chained = false
		}
		if err := d.segment(seg); err != nil {
			return fmt.Errorf("wal: dump: %w", err)
		}
	}
	if err := d.w.Flush(); err != nil {
		return fmt.Errorf("wal: dump: %w", err)
	}
	return nil
}

type dumper struct {
	w       *bufio.Writer
	o       DumpOptions
	crc     uint32
	chained bool
}

func (d *dumper) segment(seg segment) error {
	fr, err := openFrames(seg.path)
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(d.w, "== %s was removed by the running node\n", filepath.Base(seg.path))
		d.chained = false
		return nil
	}
	if err != nil {
		return err
	}
	defer fr.close()
	fr.crc, fr.chained = d.crc, d.chained
	fmt.Fprintf(d.w, "== %s\n", filepath.Base(seg.path))
	var rec record
	for {
		err := fr.next(&rec)
		var bad *badFrame
		switch {
		case err == nil:
			d.record(&rec)
		case errors.Is(err, io.EOF):
			d.crc, d.chained = fr.crc, fr.chained
			return nil
		case errors.As(err, &bad):
			fmt.Fprintf(d.w, "!! %8d  unreadable: %s\n", bad.off, bad.reason)
			c, found, err := findChain(seg.path, bad.off)
			if err != nil {
				return err
			}
			if !found {
				fmt.Fprintf(d.w, "!! %8d  nothing readable follows in this segment\n", bad.off)
				d.chained = false
				return nil
			}
			fmt.Fprintf(d.w, "!! %8d  readable again\n", c.off)
			if err := fr.seek(c.off, c.crc); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

func (d *dumper) record(rec *record) {
	switch rec.typ {
	case etcdwal.CrcType:
		fmt.Fprintf(d.w, "%11d  crc       %08x\n", rec.off, rec.crc)
	case etcdwal.MetadataType:
		fmt.Fprintf(d.w, "%11d  metadata  %s\n", rec.off, rec.data)
	case etcdwal.EntryType:
		e := &raftpb.Entry{}
		if err := proto.Unmarshal(rec.data, e); err != nil {
			fmt.Fprintf(d.w, "%11d  entry     cannot be decoded: %v\n", rec.off, err)
			return
		}
		if e.GetIndex() < d.o.From || e.GetIndex() > d.o.To {
			return
		}
		fmt.Fprintf(d.w, "%11d  entry     %d term %d %s\n", rec.off, e.GetIndex(), e.GetTerm(), d.payload(e))
	case etcdwal.StateType:
		hs := &raftpb.HardState{}
		if err := proto.Unmarshal(rec.data, hs); err != nil {
			fmt.Fprintf(d.w, "%11d  state     cannot be decoded: %v\n", rec.off, err)
			return
		}
		fmt.Fprintf(d.w, "%11d  state     term %d vote %d commit %d\n", rec.off, hs.GetTerm(), hs.GetVote(), hs.GetCommit())
	case etcdwal.SnapshotType:
		snap := &walpb.Snapshot{}
		if err := proto.Unmarshal(rec.data, snap); err != nil {
			fmt.Fprintf(d.w, "%11d  start     cannot be decoded: %v\n", rec.off, err)
			return
		}
		cs := snap.GetConfState()
		if cs == nil {
			cs = &raftpb.ConfState{}
		}
		fmt.Fprintf(d.w, "%11d  start     after %d term %d %s\n", rec.off, snap.GetIndex(), snap.GetTerm(), raft.DescribeConfState(cs))
	default:
		fmt.Fprintf(d.w, "%11d  unknown   type %d, %d bytes: written by a newer version\n", rec.off, rec.typ, len(rec.data))
	}
}

func (d *dumper) payload(e *raftpb.Entry) string {
	if e.GetType() == raftpb.EntryNormal {
		return d.o.EntryFormatter(e)
	}
	var cc raftpb.ConfChangeI
	var err error
	if e.GetType() == raftpb.EntryConfChange {
		v1 := &raftpb.ConfChange{}
		err, cc = proto.Unmarshal(e.GetData(), v1), v1
	} else {
		v2 := &raftpb.ConfChangeV2{}
		err, cc = proto.Unmarshal(e.GetData(), v2), v2
	}
	if err != nil {
		return "membership change that cannot be decoded: " + err.Error()
	}
	return "membership " + raftpb.ConfChangesToString(cc.AsV2().GetChanges())
}

func formatPayload(e *raftpb.Entry) string {
	const shown = 48
	b := e.GetData()
	if len(b) > shown {
		return fmt.Sprintf("%d bytes %q...", len(b), b[:shown])
	}
	return fmt.Sprintf("%d bytes %q", len(b), b)
}
