// Package snap keeps images of the replicated state on disk and moves them
// between nodes.
//
// An image is a directory of plain files with a MANIFEST that says which
// position of the log the files reflect and holds a checksum of each. The
// package knows nothing of what the files mean; it does not install images
// and does not decide when one is needed.
//
//	info, err := store.Create(ctx, func(dir string) (snap.Meta, error) {
//		pos, err := stateMachine.Image(dir)
//		return snap.Meta{Index: pos.Index, Term: pos.Term, ConfState: pos.ConfState}, err
//	})
//
// A sender opens the image and reads chunks, from wherever the receiver stands:
//
//	reader, err := sending.Open(info.ID)
//	defer reader.Close()
//	for offset := start; ; {
//		chunk, err := limit.ReadChunk(ctx, reader, offset, 0) // io.EOF at the end
//		...
//	}
//
//	receiver, err := receiving.Receive(id, size)
//	start := receiver.Offset()
//	err = receiver.Write(chunk) // for each
//	info, err := receiver.Commit()
//
// # Invariants
//
//  1. A listed image is whole. Its directory got its name by a rename that came
//     after the fsync of every file, of the manifest and of the directory.
//  2. A directory without a valid manifest does not exist for List and Create;
//     Open and Verify say what is wrong with it.
//  3. An id names one content: it is derived from the manifest, which holds the
//     checksum of every file.
//  4. A crash or an error at any point leaves the images that were there and,
//     of the one being made, received or deleted, all or nothing.
//  5. A pinned image (an open Reader, a running Verify) keeps its files in place.
//     Delete and Purge hide it at once and remove it at the last unpin.
//  6. Receiver.Offset counts only bytes that were compared with a checksum
//     after they were read back from the disk or as they arrived; Commit
//     compares all of them again on the disk.
//  7. No name from a manifest or a caller reaches the file system unless it is
//     a single path element of harmless characters.
//
// The package starts no goroutines. All disk access goes through vfs.FS.
package snap
