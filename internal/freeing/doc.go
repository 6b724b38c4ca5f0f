// Package freeing removes large files without making everybody else wait for the disk.
//
// On a file system that is mounted with discard, as those of clouds often are, the disk is
// told of the blocks of a removed file, and no sync of any other file ends before it has
// taken note. Where a log is synced a thousand times a second, removing sixteen tables of
// 8 MiB made ten syncs take more than 5 ms, the longest 28 ms; in steps of a mebibyte, which
// take more time in all, none did (BenchmarkRemoval; docs/performance.md). A replaced state
// or an old image is some forty of them.
//
// So a Reaper removes the name of a file at once, and frees what it takes of the disk by and
// by: for a two-hundredth of the time, as long as what waits to be freed is little.
//
// To cut a file with a name instead, and remove it in the end, would leave half a file when
// the process ends in between. One without a name is freed by the system then.
package freeing
