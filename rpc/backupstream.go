package rpc

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/recovery"
	"conveyor.etl/router/rpc/routerpb/backuppb"
)

// dataChunkBytes is the size of the chunks sent; those received may have any
// size up to the limit of a message.
const dataChunkBytes = 256 << 10

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func compressionOf(c backuppb.CompressionType) (archive.Compression, error) {
	switch c {
	case backuppb.CompressionType_COMPRESSION_NONE:
		return archive.None, nil
	case backuppb.CompressionType_COMPRESSION_GZIP:
		return archive.Gzip, nil
	case backuppb.CompressionType_COMPRESSION_ZSTD:
		return archive.Zstd, nil
	}
	return 0, invalid("compression", "%d is none of none (0), gzip (1), zstd (2)", c)
}

// StreamSnapshot sends a snapshot as an archive, from byte offset on.
func (a *backupAPI) StreamSnapshot(req *backuppb.StreamSnapshotRequest, stream backuppb.BackupService_StreamSnapshotServer) error {
	r, err := a.recovery()
	if err != nil {
		return err
	}
	compression, err := compressionOf(req.GetCompression())
	if err != nil {
		return err
	}
	if err := shelf.CheckID(req.GetSnapshotId()); err != nil {
		return err
	}
	ctx := stream.Context()
	d, err := r.Stream(ctx, req.GetSnapshotId(), compression, int64(req.GetOffset()))
	if errors.Is(err, shelf.ErrNotFound) && relayed(ctx) == "" {
		return a.passOn(req, stream)
	}
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }() // it was only read
	return a.sendArchive(stream, d, req.GetOffset())
}

// send sends one chunk; an error says how a download that broke goes on.
func (a *backupAPI) send(stream backuppb.BackupService_StreamSnapshotServer, chunk *backuppb.DataChunk) error {
	err := a.idle.bound(stream.Context(), "taken nothing", func() error { return stream.Send(chunk) })
	if errors.Is(err, ErrStalled) {
		return fmt.Errorf("%w; ask again with the offset of the first byte that is missing", err)
	}
	return err
}

// sendArchive sends what d holds. Every chunk is read before the one before it
// is sent: only then it is known which is the last.
func (a *backupAPI) sendArchive(stream backuppb.BackupService_StreamSnapshotServer, d *recovery.Download, offset uint64) error {
	// Two buffers take turns: a chunk was copied when it has been sent.
	buf, other := make([]byte, dataChunkBytes), make([]byte, dataChunkBytes)
	read := func() ([]byte, error) {
		buf, other = other, buf
		n, err := io.ReadFull(d, buf)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = nil
		}
		return buf[:n], err
	}
	data, err := read()
	if err != nil {
		return err
	}
	total := uint64(d.RawSize())
	for {
		var next []byte
		if len(data) == dataChunkBytes {
			if next, err = read(); err != nil {
				return err
			}
		}
		chunk := &backuppb.DataChunk{
			Data: data, Offset: offset, IsLast: len(next) == 0,
			Crc32C: crc32.Checksum(data, castagnoli), TotalBytes: total,
		}
		if err := a.send(stream, chunk); err != nil {
			return err
		}
		if chunk.IsLast {
			return nil
		}
		offset, total, data = offset+uint64(len(data)), 0, next
	}
}

// passOn streams a snapshot that another node has.
func (a *backupAPI) passOn(req *backuppb.StreamSnapshotRequest, stream backuppb.BackupService_StreamSnapshotServer) error {
	node, err := a.holder(stream.Context(), req.GetSnapshotId())
	if err != nil {
		return err
	}
	conn, ctx, err := a.relay.to(stream.Context(), node)
	if err != nil {
		return err
	}
	from, err := backuppb.NewBackupServiceClient(conn).StreamSnapshot(ctx, req)
	if err != nil {
		return err
	}
	for {
		chunk, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := a.send(stream, chunk); err != nil {
			return err
		}
	}
}

// UploadSnapshot takes an archive in. Chunks come in order without a gap; the
// last one says so. Compression is found out from the content. Until everything
// was checked there is no snapshot, and after an error nothing of it is left.
func (a *backupAPI) UploadSnapshot(stream backuppb.BackupService_UploadSnapshotServer) error {
	r, err := a.recovery()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	first, err := a.nextChunk(ctx, stream)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	origin := shelf.Uploaded
	if first.GetTemporary() {
		origin = shelf.ForRestore
	}
	in, out := io.Pipe()
	type outcome struct {
		rec shelf.Record
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		rec, err := r.Import(ctx, in, origin)
		if err == nil {
			// What comes behind the archive is no part of it.
			err = drained(in)
			if err != nil {
				_, derr := r.Delete(rec.ID)
				err = errors.Join(err, derr)
			}
		}
		// Unblocks the writer below, with the reason.
		in.CloseWithError(cmpErr(err, io.ErrClosedPipe))
		done <- outcome{rec, err}
	}()
	err = a.receiveArchive(ctx, stream, first, err, out)
	if err != nil {
		cancel(err)
	}
	out.CloseWithError(cmpErr(err, io.EOF))
	res := <-done
	switch {
	case err != nil && !errors.Is(err, io.ErrClosedPipe) && !errors.Is(err, errImportEnded):
		if res.err == nil {
			_, derr := r.Delete(res.rec.ID)
			err = errors.Join(err, derr)
		}
		return err
	case res.err != nil:
		return res.err
	}
	return stream.SendAndClose(&backuppb.UploadSnapshotResponse{
		Success: true, SnapshotId: res.rec.ID, SizeBytes: uint64(res.rec.Bytes), StateHash: res.rec.ContentHash,
	})
}

// errImportEnded: the import has an error of its own to tell.
var errImportEnded = errors.New("rpc: the import has ended")

func cmpErr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

func drained(in io.Reader) error {
	var b [1]byte
	n, err := io.ReadFull(in, b[:])
	if n > 0 {
		return fmt.Errorf("%w: there is more behind its end", archive.ErrCorrupt)
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// nextChunk waits for the next chunk of an upload, for as long as a transfer may
// stand still.
func (a *backupAPI) nextChunk(ctx context.Context, stream backuppb.BackupService_UploadSnapshotServer) (chunk *backuppb.DataChunk, err error) {
	err = a.idle.bound(ctx, "sent nothing", func() (err error) {
		chunk, err = stream.Recv()
		return err
	})
	return chunk, err
}

// receiveArchive writes the chunks of stream to out. It returns errImportEnded
// when the reader of out has given up. chunk and err are what came first.
func (a *backupAPI) receiveArchive(ctx context.Context, stream backuppb.BackupService_UploadSnapshotServer, chunk *backuppb.DataChunk, err error, out io.Writer) error {
	var at uint64
	for ; ; chunk, err = a.nextChunk(ctx, stream) {
		if errors.Is(err, ErrStalled) {
			return fmt.Errorf("%w after %d bytes; nothing was kept: send the archive again from its beginning", err, at)
		}
		if errors.Is(err, io.EOF) {
			return invalid("is_last", "the upload ended after %d bytes without a last chunk; nothing was kept", at)
		}
		if err != nil {
			return err
		}
		if chunk.GetOffset() != at {
			return invalid("offset", "a chunk begins at %d, %d bytes were received; nothing was kept, send the chunks in order", chunk.GetOffset(), at)
		}
		if len(chunk.GetData()) == 0 && !chunk.GetIsLast() {
			return invalid("data", "an empty chunk at %d; nothing was kept", at)
		}
		if want := chunk.GetCrc32C(); want != 0 && want != crc32.Checksum(chunk.GetData(), castagnoli) {
			return status.Errorf(codes.DataLoss, "the chunk at %d was damaged on its way; nothing was kept, send the archive again", at)
		}
		if _, err := out.Write(chunk.GetData()); err != nil {
			return errImportEnded
		}
		at += uint64(len(chunk.GetData()))
		if chunk.GetIsLast() {
			return nil
		}
	}
}
