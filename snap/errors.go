package snap

import (
	"errors"
	"fmt"
)

// The errors of the package, to be compared with errors.Is. Unless a comment
// says otherwise, an error means that the set of images is what it was.
var (
	// ErrNotFound: the store holds no image with this id.
	ErrNotFound = errors.New("snap: no such image")
	// ErrExists: the store already holds this image, whole; use it.
	ErrExists = errors.New("snap: the image is already here")
	// ErrCorrupt: an image is damaged on disk or was damaged before it was
	// sent. It was not used. The error is a *CorruptError.
	ErrCorrupt = errors.New("snap: corrupt image")
	// ErrInvalidID: the text cannot be an image id.
	ErrInvalidID = errors.New("snap: invalid image id")
	// ErrTooLarge: an image, its manifest or a chunk exceeds a limit of
	// Options, or a stream is longer than was announced.
	ErrTooLarge = errors.New("snap: over a size limit")
	// ErrOutOfOrder: a chunk does not start where the stream stands. The
	// error is an *OffsetError, which holds the expected offset.
	ErrOutOfOrder = errors.New("snap: chunk out of order")
	// ErrBadChunk: a chunk was damaged on its way (checksum, empty, or its end
	// mark is wrong). It was not taken; send it again from Receiver.Offset.
	ErrBadChunk = errors.New("snap: bad chunk")
	// ErrNewerFormat: the image was written by a newer version of the program
	// in a format that this one cannot read. The image may be whole.
	ErrNewerFormat = errors.New("snap: image format is newer than this program")
	// ErrBusy: the image is being received already, or as many images as
	// Options allows are. Nothing was begun; try again later.
	ErrBusy = errors.New("snap: too many images are being received")
	// ErrNoSpace: the disk has no room for the announced image.
	ErrNoSpace = errors.New("snap: not enough disk space for the image")
	// ErrClosed: the Reader or Receiver was closed, committed or aborted.
	ErrClosed = errors.New("snap: closed")
)

// CorruptError says which file of which image is damaged and how. It matches
// ErrCorrupt.
type CorruptError struct {
	// Image is the id of the image, or its directory when it has no id.
	Image string
	// File is the name of the damaged file inside the image.
	File string
	// Detail says what is wrong with File.
	Detail string
}

// Error implements error.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("snap: corrupt image %s: file %s: %s; the image was not used: "+
		"delete it and let it be made or sent again (check the disk if this repeats)",
		e.Image, e.File, e.Detail)
}

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// OffsetError refuses a chunk that does not continue the stream. Nothing of
// the chunk was taken. It matches ErrOutOfOrder.
type OffsetError struct {
	// Expected is the offset at which the next chunk must start.
	Expected int64
	// Got is the offset of the refused chunk.
	Got int64
}

// Error implements error.
func (e *OffsetError) Error() string {
	return fmt.Sprintf("snap: chunk out of order: got offset %d, expected %d; "+
		"the chunk was not taken, continue at the expected offset", e.Got, e.Expected)
}

// Is makes errors.Is(err, ErrOutOfOrder) true.
func (e *OffsetError) Is(target error) bool { return target == ErrOutOfOrder }
