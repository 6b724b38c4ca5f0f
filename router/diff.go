package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// TableDiff compares one kind of record of a snapshot with the live state.
type TableDiff struct {
	Table string
	// How many records there are.
	InSnapshot, Live uint64
	// Added would be brought back by a restore of the snapshot, Removed would be
	// taken away, Changed would get another content.
	Added, Removed, Changed uint64
	// Examples are a few ids in order, each with + (added), - (removed) or ~
	// (changed) before it.
	Examples []string
}

// maxExamples bounds the ids named per table.
const maxExamples = 10

// diffTables are the kinds of records users know.
const diffTables = "psvgowfca"

// Diff compares the records of a snapshot with those of the live state, table by
// table. It reads both wholly and keeps nothing but the numbers.
func Diff(ctx context.Context, live, snapshot *View) ([]TableDiff, error) {
	var out []TableDiff
	err := live.read(func(l pebble.Reader) error {
		return snapshot.read(func(s pebble.Reader) error {
			for i := range len(diffTables) {
				d, err := diffTable(ctx, l, s, diffTables[i])
				if err != nil {
					return err
				}
				out = append(out, d)
			}
			return nil
		})
	})
	return out, err
}

func diffTable(ctx context.Context, live, snapshot pebble.Reader, prefix byte) (d TableDiff, err error) {
	d.Table = tableName(prefix)
	o := &pebble.IterOptions{LowerBound: []byte{prefix}, UpperBound: []byte{prefix + 1}}
	l, err := live.NewIter(o)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	s, err := snapshot.NewIter(o)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	note := func(sign string, n *uint64, k []byte) {
		*n++
		if len(d.Examples) < maxExamples {
			d.Examples = append(d.Examples, sign+idOf(k))
		}
	}
	inLive, inSnapshot := l.First(), s.First()
	for n := 1; inLive || inSnapshot; n++ {
		if n%4096 == 0 && ctx.Err() != nil {
			return d, ctx.Err()
		}
		order := 0
		switch {
		case !inLive:
			order = 1
		case !inSnapshot:
			order = -1
		default:
			order = bytes.Compare(l.Key(), s.Key())
		}
		switch {
		case order < 0:
			note("-", &d.Removed, l.Key())
		case order > 0:
			note("+", &d.Added, s.Key())
		default:
			a, aerr := l.ValueAndErr()
			b, berr := s.ValueAndErr()
			if err := errors.Join(aerr, berr); err != nil {
				return d, err
			}
			if !bytes.Equal(a, b) {
				note("~", &d.Changed, l.Key())
			}
		}
		if order <= 0 {
			d.Live++
			inLive = l.Next()
		}
		if order >= 0 {
			d.InSnapshot++
			inSnapshot = s.Next()
		}
	}
	return d, errors.Join(l.Error(), s.Error())
}

func tableName(prefix byte) string {
	if kind, ok := sumOf(prefix); ok {
		return sumTables()[kind].name
	}
	return sumTables()[sumCheckpoints].name
}

// idOf writes the key of a record for people.
func idOf(k []byte) string {
	switch k[0] {
	case prefixSourceOffset, prefixWatermark:
		if source, p, err := decodePartition(k); err == nil {
			return fmt.Sprintf("%s/%d", source, p)
		}
	case prefixGroupOffset:
		if group, source, p, err := decodeGroupOffset(k); err == nil {
			return fmt.Sprintf("%s/%s/%d", group, source, p)
		}
	case prefixAssignment, prefixHandover:
		if sidecar, pipeline, err := decodePair(k); err == nil {
			return sidecar + "/" + pipeline
		}
	}
	return string(k[1:])
}
