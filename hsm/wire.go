package hsm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// The conversation between parent and child over their socketpair. Frame =
// u32 length (of what follows) | u32 sequence | u8 code | body, big-endian. In
// requests code is an opcode, in replies a status. Both ends are the same
// program, so the protocol has no version.

// Opcodes. Bodies: see the encoders in token.go and child.go.
const (
	opHello    = 1
	opGenerate = 2
	opFind     = 3
	opDestroy  = 4
	opObjects  = 5
	opDecrypt  = 6
	opSign     = 7
	opSeal     = 8
	opOpen     = 9
	opHealth   = 10
	opLast     = opHealth
)

// Statuses. All but statusOK carry a message.
const (
	statusOK           = 0
	statusAuth         = 1
	statusUnavailable  = 2
	statusNotFound     = 3
	statusExists       = 4
	statusInvalid      = 5
	statusPrecondition = 6
	statusCorrupt      = 7
	statusExhausted    = 8
	statusRebuild      = 9  // unavailable, and only a new child can help
	statusPIN          = 10 // precondition: the PIN was refused; don't try it again
)

const (
	frameHeader = 4 + 4 + 1
	maxFrame    = 1 << 20 // 65,000 object ids
)

var (
	// errRebuild marks ErrUnavailable answers after which the child is replaced.
	errRebuild = errors.New("token context lost")
	// errPIN marks ErrPrecondition answers caused by a refused PIN.
	errPIN = errors.New("PIN refused")
)

// statuses is the one table between classes and statuses.
var statuses = []struct {
	status byte
	class  error
}{
	{statusAuth, dek.ErrAuth},
	{statusNotFound, dek.ErrNotFound},
	{statusExists, dek.ErrExists},
	{statusInvalid, dek.ErrInvalid},
	{statusCorrupt, dek.ErrCorrupt},
	{statusExhausted, dek.ErrExhausted},
	{statusRebuild, errRebuild},
	{statusPIN, errPIN},
	{statusPrecondition, dek.ErrPrecondition},
	{statusUnavailable, dek.ErrUnavailable},
}

// statusOf returns the status and message of err; unclassed errors are
// unavailable: nothing is known.
func statusOf(err error) (byte, string) {
	for _, s := range statuses {
		if errors.Is(err, s.class) {
			return s.status, err.Error()
		}
	}
	return statusUnavailable, err.Error()
}

// A remoteError is an error of the child: its class and its text, once.
type remoteError struct {
	classes []error
	text    string
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.classes }

// errorOf is the inverse of statusOf.
func errorOf(status byte, text string) error {
	switch status {
	case statusRebuild:
		return &remoteError{[]error{dek.ErrUnavailable, errRebuild}, text}
	case statusPIN:
		return &remoteError{[]error{dek.ErrPrecondition, errPIN}, text}
	}
	for _, s := range statuses {
		if s.status == status {
			return &remoteError{[]error{s.class}, text}
		}
	}
	return fmt.Errorf("%w: token child answered status %d", dek.ErrUnavailable, status)
}

// A frame is one message. Its body aliases the reader's buffer.
type frame struct {
	seq  uint32
	code byte
	body []byte
}

// A frameReader splits a stream into frames and wipes each when the next is
// asked for, because some carry keys.
type frameReader struct {
	r          io.Reader
	buf        []byte
	start, end int // unread bytes
	used       int // start of the frame handed out last
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: r, buf: make([]byte, 64<<10)}
}

// next returns the next frame, valid until next is called again.
func (f *frameReader) next() (frame, error) {
	clear(f.buf[f.used:f.start])
	f.used = f.start
	if err := f.fill(4); err != nil {
		return frame{}, err
	}
	n := int(binary.BigEndian.Uint32(f.buf[f.start:]))
	if n < frameHeader-4 || n > maxFrame {
		return frame{}, fmt.Errorf("%w frame of %d bytes", errShort, n)
	}
	if err := f.fill(4 + n); err != nil {
		return frame{}, err
	}
	b := f.buf[f.start : f.start+4+n]
	f.used = f.start
	f.start += 4 + n
	return frame{seq: binary.BigEndian.Uint32(b[4:]), code: b[8], body: b[frameHeader:]}, nil
}

// fill reads until n bytes are unread.
func (f *frameReader) fill(n int) error {
	for f.end-f.start < n {
		if f.start+n > len(f.buf) || f.start == f.end {
			f.compact(n)
		}
		m, err := f.r.Read(f.buf[f.end:])
		f.end += m
		if err != nil && f.end-f.start < n {
			if errors.Is(err, io.EOF) && f.end > f.start {
				return io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// compact moves the unread bytes to the front of a buffer of at least n bytes
// and wipes where they were.
func (f *frameReader) compact(n int) {
	old, dst := f.buf, f.buf
	if n > len(f.buf) {
		dst = make([]byte, n)
	}
	unread := copy(dst, old[f.start:f.end])
	if &dst[0] == &old[0] {
		clear(old[unread:f.end])
	} else {
		clear(old)
	}
	f.buf, f.start, f.end, f.used = dst, 0, unread, 0
}

// A frameWriter joins frames that are sent at the same moment into one write:
// whoever finds nobody writing writes for all, until nothing is left.
type frameWriter struct {
	w     io.Writer
	order func(seq uint32) // told of each frame in the order of the wire, with mu held; may be nil

	mu      sync.Mutex
	writing bool
	err     error
	buf     []byte
	spare   []byte
	frames  int         // in buf
	late    *time.Timer // flushes what post left, nil before the first
}

// minWriteBuffer is the first size of a writer's buffer, in bytes.
const minWriteBuffer = 4 << 10

// lateFlush bounds how long a posted frame waits for company.
const lateFlush = 4 * time.Millisecond

// send queues one frame and returns once it is written or another sender has
// taken it on. Written bytes are wiped.
func (w *frameWriter) send(seq uint32, code byte, body []byte) error {
	return w.post(seq, code, body, 1)
}

// post is send, but leaves the frame until batch of them have come together, or
// lateFlush has passed. Each write wakes the other process, which costs more
// than the write.
func (w *frameWriter) post(seq uint32, code byte, body []byte, batch int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	w.grow(frameHeader + len(body))
	w.buf = binary.BigEndian.AppendUint32(w.buf, uint32(frameHeader-4+len(body)))
	w.buf = binary.BigEndian.AppendUint32(w.buf, seq)
	w.buf = append(w.buf, code)
	w.buf = append(w.buf, body...)
	w.frames++
	if w.order != nil {
		w.order(seq)
	}
	if w.writing {
		return nil
	}
	if w.frames < batch {
		if w.late == nil {
			w.late = time.AfterFunc(lateFlush, w.flush)
		} else if w.frames == 1 {
			w.late.Reset(lateFlush)
		}
		return nil
	}
	return w.write()
}

// grow makes room for n more bytes and wipes the buffer it leaves: frames carry
// keys, and append would leave them on the heap. w.mu is held.
func (w *frameWriter) grow(n int) {
	if len(w.buf)+n <= cap(w.buf) {
		return
	}
	old := w.buf
	w.buf = append(make([]byte, 0, max(2*cap(old), len(old)+n, minWriteBuffer)), old...)
	clear(old)
}

// flush writes what is queued. Its error shows in the next post.
func (w *frameWriter) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.writing {
		_ = w.write()
	}
}

// write writes until nothing is left. The caller holds mu; it is released
// while the bytes go out.
func (w *frameWriter) write() error {
	w.writing = true
	for len(w.buf) > 0 && w.err == nil {
		out := w.buf
		w.buf, w.frames = w.spare[:0], 0
		w.mu.Unlock()
		_, err := w.w.Write(out)
		clear(out)
		w.mu.Lock()
		w.spare, w.err = out[:0], err
	}
	w.writing = false
	return w.err
}

// A hello is the first request: everything that the child must know.
type hello struct {
	module   string
	uri      string
	pinFile  string
	pinState string
	expect   Identity
	workers  int
	deadline time.Duration
}

func (h hello) append(b []byte) []byte {
	for _, s := range []string{h.module, h.uri, h.pinFile, h.pinState} {
		b = appendStr(b, s)
	}
	b = h.expect.append(b)
	b = binary.BigEndian.AppendUint16(b, uint16(h.workers))
	return binary.BigEndian.AppendUint64(b, uint64(h.deadline))
}

func parseHello(b []byte) (hello, error) {
	d := &decoder{b: b}
	h := hello{module: d.str(), uri: d.str(), pinFile: d.str(), pinState: d.str(), expect: parseIdentity(d)}
	h.workers, h.deadline = int(d.u16()), time.Duration(d.u64())
	if err := d.done(); err != nil || h.workers < 1 || h.deadline <= 0 {
		return hello{}, errShort
	}
	return h, nil
}

func (i Identity) append(b []byte) []byte {
	for _, s := range []string{i.Label, i.Serial, i.Model, i.Manufacturer, i.Fingerprint} {
		b = appendStr(b, s)
	}
	return b
}

func parseIdentity(d *decoder) Identity {
	return Identity{Label: d.str(), Serial: d.str(), Model: d.str(), Manufacturer: d.str(), Fingerprint: d.str()}
}

func (c Capabilities) append(b []byte) []byte {
	b = append(b, byte(len(c.OAEP)))
	for _, h := range c.OAEP {
		b = append(b, hashCode(h))
	}
	b = append(b, byte(len(c.RSABits)))
	for _, bits := range c.RSABits {
		b = binary.BigEndian.AppendUint16(b, uint16(bits))
	}
	return appendFlag(appendFlag(appendFlag(appendFlag(b, c.AESGCM), c.ECDSA), c.Origin), c.Survives)
}

func parseCapabilities(d *decoder) Capabilities {
	var c Capabilities
	for range d.u8() {
		h := codeHash(d.u8())
		d.bad = d.bad || h == 0
		c.OAEP = append(c.OAEP, h)
	}
	for range d.u8() {
		c.RSABits = append(c.RSABits, int(d.u16()))
	}
	c.AESGCM, c.ECDSA, c.Origin, c.Survives = d.flag(), d.flag(), d.flag(), d.flag()
	return c
}
