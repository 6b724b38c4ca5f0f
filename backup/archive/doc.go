// Package archive is the format of backups: one stream of bytes that holds an
// image of the state and says what it is.
//
// The stream is a tar of plain files, compressed or not:
//
//	backup.json   what the backup is: a Header
//	MANIFEST      the manifest of the image, see package snap
//	...           the files of the image in the order of the manifest
//	checksum      SHA-256, in hex, of every byte of the tar before this entry
//
// and the two blocks of zeroes that end a tar. Any tar and zstd can unpack one;
// only this package decides whether it is whole.
//
// # Invariants
//
//  1. The same image and header with the same compression give the same bytes,
//     so a broken transfer goes on at the offset where it broke.
//  2. Reading accepts exactly what writing makes: every header is compared byte
//     for byte with the one that would be written, padding must be zero, and
//     nothing may follow the end, neither inside nor outside of the compression.
//  3. Sizes are compared with the limits before a byte is written, and names
//     are single path elements of harmless characters that the manifest lists.
//  4. Extract leaves a whole image, durable on disk, or nothing at all.
//  5. Memory is bounded: a few MiB, whatever the archive holds.
//
// The package starts no goroutines.
package archive
