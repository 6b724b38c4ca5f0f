package snap

import (
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// Member is one node of the group at the position of an image.
type Member struct {
	// ID is the raft id of the node.
	ID uint64 `json:"id"`
	// Addr is the host:port of the node's peer listener.
	Addr string `json:"addr"`
}

// Meta says which state an image holds.
type Meta struct {
	// Index and Term are those of the last log entry the state reflects;
	// neither may be zero.
	Index uint64
	Term  uint64
	// ConfState is the group configuration in force at Index. It is nil in
	// images that carry no membership.
	ConfState *raftpb.ConfState
	// Members lists the peer addresses known at Index.
	Members []Member
	// Format is the version of the image layout. Create fills it in; a build
	// function leaves it zero.
	Format int
}

// File is one file of an image.
type File struct {
	// Name is a single path element.
	Name string
	// Size is in bytes.
	Size int64
	// CRC is the crc32c (Castagnoli) of the content.
	CRC uint32
}

// Info describes a whole image. Its slices and ConfState are shared: read only.
type Info struct {
	// ID names the image; it is derived from the manifest, so images with
	// different content have different ids on whichever node they were made.
	ID string
	Meta
	// Created is when the image was made, by the clock of the node that made
	// it, to the millisecond.
	Created time.Time
	// Files are sorted by name, the order in which they are streamed.
	Files []File
	// Bytes is the size of all files, Size that of the stream: the manifest
	// followed by all files.
	Bytes, Size int64
}

// newer reports whether a comes before b in a list of the newest first.
func newer(a, b *Info) bool {
	switch {
	case a.Index != b.Index:
		return a.Index > b.Index
	case a.Term != b.Term:
		return a.Term > b.Term
	case !a.Created.Equal(b.Created):
		return a.Created.After(b.Created)
	}
	return a.ID > b.ID
}
