// Package shelf keeps the snapshots that people made on a node, or brought to
// it, under the ids they know them by.
//
// A snapshot is an image (package snap) and a record beside it that says where
// it came from:
//
//	backups/images/        the images, named by their content
//	backups/<id>.json      one record for each snapshot
//
// Two snapshots may share an image. The record is what makes a snapshot exist:
// it is written after its image, durably, and removed before it. What a crash
// leaves without its other half is removed by the next Open.
//
// The images are apart from those a node makes for its followers, which come and
// go by themselves.
package shelf
