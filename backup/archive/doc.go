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
// only this package decides whether it is whole. With zstd each mebibyte of the tar is a
// frame of its own, which says how long it is, so that some are made and read side by side.
//
// # Invariants
//
//  1. The same image and header with the same compression give the same bytes in the
//     same release, so a broken transfer goes on at the offset where it broke. How many
//     processors there are makes no difference. One that goes on with another release
//     is refused by whoever reads it, and begins anew.
//  2. Reading accepts exactly what writing makes: every header is compared byte
//     for byte with the one that would be written, padding must be zero, and
//     nothing may follow the end, neither inside nor outside of the compression. The
//     compression itself may be anybody's: one frame or many, none of them empty, and
//     nothing between them.
//  3. Sizes are compared with the limits before a byte is written, and names
//     are single path elements of harmless characters that the manifest lists.
//  4. Extract leaves a whole image, durable on disk, or nothing at all, and so does
//     Unpack once it is settled.
//  5. Memory is bounded: three MiB for each of five frames at most, nine for one that is
//     read as a stream, and little else, whatever the archive holds.
//
// Hashing, compressing, decompressing and storing go on beside the caller, in goroutines
// that each end with one piece of that: none outlives its archive by more.
package archive
