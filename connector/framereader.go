package connector

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"time"
)

// frameBuffer is what a connection holds for reading; it grows, up to one
// frame, only for a peer that sends more.
const frameBuffer = 2048

// A frameReader cuts a stream into frames. A frame that has begun must be whole
// within limit; between frames it waits for ever.
type frameReader struct {
	conn  net.Conn
	limit time.Duration
	buf   []byte
	r, w  int
	timed bool  // a read deadline is set
	err   error // of a read that hangup made
}

func newFrameReader(conn net.Conn, limit time.Duration) *frameReader {
	return &frameReader{conn: conn, limit: limit, buf: make([]byte, frameBuffer)}
}

// A frame is one request or reply; body is valid until the next read.
type frame struct {
	op   byte
	seq  uint32
	body []byte
}

// buffered cuts a frame off what was read, if it is whole.
func (f *frameReader) buffered() (frame, bool, error) {
	have := f.buf[f.r:f.w]
	if len(have) < 4 {
		return frame{}, false, nil
	}
	n := binary.BigEndian.Uint32(have)
	if n < minFrame || n > maxFrame {
		return frame{}, false, errFrame
	}
	if len(have) < 4+int(n) {
		return frame{}, false, nil
	}
	whole := have[:4+n]
	f.r += len(whole)
	return frame{op: whole[4], seq: binary.BigEndian.Uint32(whole[5:]), body: whole[frameHeader:]}, true, nil
}

// next returns the next frame. It returns io.EOF for a connection that ends
// between frames, and errFrame for bytes that are no frame, one that stops in
// the middle, or one that takes longer than the limit.
func (f *frameReader) next() (frame, error) {
	for {
		fr, whole, err := f.buffered()
		if err != nil {
			return frame{}, err
		}
		if whole {
			return fr, f.untime()
		}
		if err := f.prepare(); err != nil {
			return frame{}, err
		}
		if err := f.fill(); err != nil {
			return frame{}, f.explain(err)
		}
	}
}

// prepare makes room and sets the deadline once a frame has begun.
func (f *frameReader) prepare() error {
	if f.r == f.w {
		f.r, f.w = 0, 0
		return nil
	}
	if !f.timed {
		if err := f.deadline(f.limit); err != nil {
			return err
		}
	}
	if f.w < len(f.buf) {
		return nil
	}
	if f.r == 0 {
		bigger := make([]byte, min(2*len(f.buf), 4+maxFrame))
		copy(bigger, f.buf[:f.w])
		clear(f.buf)
		f.buf = bigger
		return nil
	}
	f.w = copy(f.buf, f.buf[f.r:f.w])
	f.r = 0
	return nil
}

func (f *frameReader) fill() error {
	if f.err != nil {
		return f.err
	}
	n, err := f.conn.Read(f.buf[f.w:])
	f.w += n
	if n > 0 {
		f.err = err
		return nil
	}
	return err
}

func (f *frameReader) explain(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.Join(errFrame, errors.New("not finished in time"))
	case errors.Is(err, io.EOF) && f.r != f.w:
		return errors.Join(errFrame, io.ErrUnexpectedEOF)
	}
	return err
}

func (f *frameReader) deadline(d time.Duration) error {
	f.timed = true
	return f.conn.SetReadDeadline(time.Now().Add(d))
}

func (f *frameReader) untime() error {
	if !f.timed {
		return nil
	}
	f.timed = false
	return f.conn.SetReadDeadline(time.Time{})
}

// hangup runs wait and ends its context-like channel early if the peer goes
// away meanwhile: it reads ahead while nothing else does. What the peer sends
// is kept for next.
func (f *frameReader) hangup(wait func(gone <-chan struct{})) {
	if f.r != f.w || f.err != nil {
		wait(nil) // the peer has sent more, so it is there
		return
	}
	f.r, f.w = 0, 0
	gone, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		if err := f.fill(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			f.err = err
			close(gone)
		}
	}()
	wait(gone)
	_ = f.conn.SetReadDeadline(time.Unix(1, 0)) // ends the read
	<-done
	_ = f.conn.SetReadDeadline(time.Time{})
}
