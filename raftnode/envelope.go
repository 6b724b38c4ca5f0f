package raftnode

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// A batch is the Data of a normal entry:
//
//	1 byte   version
//	8 bytes  batch id, little endian
//	then per command: uvarint length, bytes
//
// An entry without Data is what a new leader begins its term with.
const (
	envelopeVersion = 1
	envelopeHeader  = 9
)

// beginEnvelope appends the header with a zero id to buf.
func beginEnvelope(buf []byte) []byte {
	return append(buf, envelopeVersion, 0, 0, 0, 0, 0, 0, 0, 0)
}

func setEnvelopeID(buf []byte, id uint64) { binary.LittleEndian.PutUint64(buf[1:], id) }

func appendCommand(buf, cmd []byte) []byte {
	buf = binary.AppendUvarint(buf, uint64(len(cmd)))
	return append(buf, cmd...)
}

// envelopeID returns the batch id of data, false when it is no envelope.
func envelopeID(data []byte) (uint64, bool) {
	if len(data) < envelopeHeader || data[0] != envelopeVersion {
		return 0, false
	}
	return binary.LittleEndian.Uint64(data[1:]), true
}

// decodeEnvelope appends the commands in data to cmds. They alias data.
func decodeEnvelope(data []byte, cmds [][]byte) (id uint64, _ [][]byte, err error) {
	if len(data) < envelopeHeader {
		return 0, cmds, fmt.Errorf("a batch of %d bytes is too short", len(data))
	}
	if data[0] != envelopeVersion {
		return 0, cmds, fmt.Errorf("batch format %d is unknown: a newer release wrote it; upgrade this node", data[0])
	}
	id = binary.LittleEndian.Uint64(data[1:])
	rest := data[envelopeHeader:]
	for len(rest) > 0 {
		n, k := binary.Uvarint(rest)
		if k <= 0 || n > uint64(len(rest)-k) {
			return 0, cmds, errors.New("a command's length exceeds its batch")
		}
		end := k + int(n)
		cmds = append(cmds, rest[k:end:end])
		rest = rest[end:]
	}
	return id, cmds, nil
}
