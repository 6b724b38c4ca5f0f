package router

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"conveyor.etl/router/router/commandpb"
)

// standing is what changes of assignments are judged by of a sidecar. A command of
// thousands of them asks it of every sidecar, most of whose record is the services that
// it reports.
type standing struct {
	state        commandpb.SidecarState
	generation   uint64
	created      uint64 // revision
	graceUntilMS uint64
}

// Their numbers in commandpb.Sidecar.
const (
	sidecarStateField      = 6
	sidecarGenerationField = 7
	sidecarCreatedField    = 10
	sidecarGraceField      = 20
)

// standing reads that of a sidecar, and whether there is one.
func (t *tx) standing(id string) (standing, bool) {
	k := t.buf.single(prefixSidecar, id)
	v := t.cell(k).val
	if v == nil {
		return standing{}, false
	}
	s, err := decodeStanding(v)
	if err != nil {
		t.fail(fmt.Errorf("%w: record %q: %w", ErrCorrupt, k, err))
	}
	return s, err == nil
}

// decodeStanding picks it from the record of a sidecar.
func decodeStanding(v []byte) (s standing, err error) {
	err = eachNumber(v, func(field protowire.Number, x uint64) {
		switch field {
		case sidecarStateField:
			s.state = commandpb.SidecarState(x)
		case sidecarGenerationField:
			s.generation = x
		case sidecarCreatedField:
			s.created = x
		case sidecarGraceField:
			s.graceUntilMS = x
		}
	})
	return s, err
}

// eachNumber calls fn for the fields of a record that are encoded as one number, and
// passes over the others. Of a field that is there twice the last counts.
func eachNumber(v []byte, fn func(field protowire.Number, x uint64)) error {
	for len(v) > 0 {
		field, kind, n := protowire.ConsumeTag(v)
		if n < 0 {
			return protowire.ParseError(n)
		}
		v = v[n:]
		if kind != protowire.VarintType {
			if n = protowire.ConsumeFieldValue(field, kind, v); n < 0 {
				return protowire.ParseError(n)
			}
			v = v[n:]
			continue
		}
		x, n := protowire.ConsumeVarint(v)
		if n < 0 {
			return protowire.ParseError(n)
		}
		v = v[n:]
		fn(field, x)
	}
	return nil
}
