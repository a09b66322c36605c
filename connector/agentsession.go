package connector

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// outBuffer is a session's buffer for replies: many GET replies to a client
// that pipelines. It never grows while it holds a key, because growing would
// leave a copy behind.
const outBuffer = 4096

// A session is one connection of a local database.
type session struct {
	a    *Agent
	conn net.Conn
	uid  uint32
	in   *instance // nil before a successful HELLO
	kind string

	reader  *frameReader
	out     []byte
	secret  bool      // out holds key bytes
	written time.Time // when the write deadline was last set

	get     ServerKey // of the GET being answered, and its seq
	getSeq  uint32
	copyKey func(b []byte) error // made once: a closure per GET would allocate
}

func newSession(a *Agent, c net.Conn, uid uint32) *session {
	s := &session{a: a, conn: c, uid: uid, reader: newFrameReader(c, frameTime), out: make([]byte, 0, outBuffer)}
	s.copyKey = func(b []byte) error {
		s.out = appendGetReply(s.out, s.getSeq, s.get, b)
		return nil
	}
	return s
}

func (s *session) run(ctx context.Context) {
	defer func() { clear(s.out[:cap(s.out)]) }()
	_ = s.reader.deadline(helloTime)
	for {
		f, err := s.reader.next()
		if err != nil {
			if !errors.Is(err, io.EOF) && ctx.Err() == nil {
				s.a.count.malformed.Add(1)
			}
			if errors.Is(err, errFrame) {
				s.fail(f.seq, err)
				_ = s.flush()
			}
			return
		}
		err = s.handle(ctx, f)
		if errors.Is(err, errFrame) {
			s.a.count.malformed.Add(1)
			s.fail(f.seq, err)
			_ = s.flush()
			return
		}
		if err == nil && s.in == nil {
			err = s.reader.deadline(helloTime) // refused, it may try again
		}
		if err == nil && !s.more() {
			err = s.flush()
		}
		if err != nil {
			return
		}
	}
}

// more reports whether a whole request waits in the buffer: its reply goes out
// with this one. A bad header counts as none; next will report it.
func (s *session) more() bool {
	r := s.reader.r
	_, whole, err := s.reader.buffered()
	s.reader.r = r
	return whole && err == nil && len(s.out)+getReplySize <= cap(s.out)
}

// handle answers one request into out. An error that wraps errFrame is
// answered and ends the session, as does any other.
func (s *session) handle(ctx context.Context, f frame) error {
	if s.in == nil {
		if f.op != opHello {
			return fmt.Errorf("%w: HELLO must come first", errFrame)
		}
		return s.hello(ctx, f)
	}
	switch f.op {
	case opGet:
		return s.handleGet(ctx, f)
	case opList:
		if len(f.body) != 0 {
			return errFrame
		}
		v := s.in.view.Load()
		return s.large(func(out []byte) []byte { return appendListReply(out, f.seq, v.generation, v.list) })
	case opWait:
		return s.handleWait(ctx, f)
	case opReport:
		usage, err := parseReport(f.body)
		if err != nil {
			return err
		}
		s.in.noteUsage(usage)
		s.out = appendReportReply(s.out, f.seq)
		return nil
	}
	return fmt.Errorf("%w: operation 0x%02x", errFrame, f.op)
}

// hello admits the database to its instance.
func (s *session) hello(ctx context.Context, f frame) error {
	h, err := parseHello(f.body)
	if err != nil {
		return err
	}
	in, err := s.choose(h.instance)
	if err == nil {
		err = in.hello(ctx, h)
	}
	if err != nil {
		s.a.cfg.Logger.Warn("database refused", "uid", s.uid, "instance", h.instance, "cold", h.cold, "err", err)
		s.fail(f.seq, err)
		return nil // it may try again on this connection
	}
	s.in, s.kind = in, h.kind
	s.out = appendHelloReply(s.out, f.seq, Welcome{Instance: in.name, Endpoints: in.client.Endpoints(), Refresh: in.cfg.Refresh})
	return s.reader.untime()
}

// choose finds the instance that the peer's user may speak for.
func (s *session) choose(name string) (*instance, error) {
	allowed := s.a.rules[s.uid]
	if name == "" {
		if len(allowed) != 1 {
			return nil, fmt.Errorf("%w: uid %d may use several instances (%s): name one in the server's configuration", dek.ErrInvalid, s.uid, strings.Join(allowed, ", "))
		}
		name = allowed[0]
	}
	for _, have := range allowed {
		if have == name {
			return s.a.instances[name], nil
		}
	}
	return nil, fmt.Errorf("%w: uid %d may not use instance %q on this host: the agent's configuration gives it %s", dek.ErrDenied, s.uid, name, strings.Join(allowed, ", "))
}

// handleGet is the hot path: no allocation and no lock but the cache's own.
func (s *session) handleGet(ctx context.Context, f frame) error {
	k, err := parseGet(f.body)
	if err != nil {
		return err
	}
	if len(s.out)+getReplySize > cap(s.out) {
		if err := s.flush(); err != nil {
			return err
		}
	}
	lease, err := s.in.lease(ctx, k)
	if err != nil {
		s.a.count.failedGets.Add(1)
		s.fail(f.seq, err)
		return nil
	}
	s.get, s.getSeq, s.secret = k, f.seq, true
	err = lease.Key().Use(s.copyKey)
	lease.Release()
	if err != nil {
		s.fail(f.seq, fmt.Errorf("%w: key %d version %d: %w", errInternal, k.ID, k.Version, err))
	}
	return nil
}

// handleWait answers when the generation differs, at the latest after the
// timeout, and ends if the peer goes away meanwhile.
func (s *session) handleWait(ctx context.Context, f frame) error {
	generation, timeout, err := parseWait(f.body)
	if err != nil {
		return err
	}
	seq := f.seq // the body is gone once the reader reads ahead
	v := s.in.view.Load()
	if v.generation == generation && timeout > 0 {
		if err := s.flush(); err != nil {
			return err
		}
		s.reader.hangup(func(gone <-chan struct{}) {
			t := time.NewTimer(timeout)
			defer t.Stop()
			for v.generation == generation {
				select {
				case <-v.changed:
					v = s.in.view.Load()
					continue
				case <-t.C:
				case <-gone:
				case <-ctx.Done():
				}
				return
			}
		})
	}
	s.out = appendWaitReply(s.out, seq, s.in.view.Load().generation)
	return nil
}

// large flushes what is pending and writes one reply of its own size.
func (s *session) large(build func([]byte) []byte) error {
	if err := s.flush(); err != nil {
		return err
	}
	return s.write(build(nil))
}

// fail answers with an error; the message goes to the server's log as it is.
func (s *session) fail(seq uint32, err error) {
	message := oneLine(err.Error())
	if len(s.out)+frameHeader+4+len(message) > cap(s.out) {
		if s.flush() != nil {
			return
		}
	}
	s.out = appendError(s.out, seq, socketClass(err), message)
}

// maxMessage bounds an ERROR's message in bytes.
const maxMessage = 2048

// oneLine makes a message fit for another program's log.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "")
	}
	return s
}

// flush writes the replies and wipes them if a key was among them.
func (s *session) flush() error {
	if len(s.out) == 0 {
		return nil
	}
	err := s.write(s.out)
	if s.secret {
		clear(s.out)
		s.secret = false
	}
	s.out = s.out[:0]
	return err
}

// write sends b. The deadline is moved once in a while only: setting it costs
// as much as a cache hit.
func (s *session) write(b []byte) error {
	if now := time.Now(); now.Sub(s.written) > writeTime/2 {
		if err := s.conn.SetWriteDeadline(now.Add(writeTime)); err != nil {
			return err
		}
		s.written = now
	}
	_, err := s.conn.Write(b)
	return err
}
