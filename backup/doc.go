// Package backup keeps backups: the places they are stored in, what is written
// beside them, and when the next one is due. What is inside of a backup is the
// business of package archive; to a Store it is a stream of bytes.
//
//	store, err := backup.Open(ctx, "s3://bucket/conveyor")
//	defer store.Close()
//	meta, err := store.Put(ctx, backup.Metadata{BackupID: id, ...}, stream)
//	reader, meta, err := store.Get(ctx, id) // checks size and sha256 at the end
//
// # Layout
//
//	<id>/checkpoint.tar.zst   the archive, under this name however it is compressed
//	<id>/metadata.json        what it is: Metadata
//
// # Invariants
//
//  1. A backup exists when its metadata.json does. It is written last and
//     deleted first, so no backup is listed whose archive is not complete.
//  2. An upload that fails takes away what it has stored. What a crash leaves
//     is no backup, and Cleanup removes it after a day.
//  3. No id from a caller or from a listing becomes part of a key or a path
//     unless it is a single element of harmless characters.
//  4. Memory is bounded, whatever a backup holds.
//
// file:// is built in. The drivers of s3://, gs:// and azblob:// are known once
// package backup/stores is imported; its documentation says where they find
// their credentials.
package backup
