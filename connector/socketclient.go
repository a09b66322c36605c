package connector

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// waitSlack is how long past a WAIT's own timeout its answer may take.
const waitSlack = 5 * time.Second

// A Process is what a database process says of itself to the agent.
type Process struct {
	Kind     string   // "mariadb", "postgres", ...
	Instance string   // empty: the one that this user may use
	Nonce    [16]byte // random per process, the same on every connection
	Cold     bool     // the process holds no key yet
}

// NewProcess describes a process that starts: a fresh nonce, cold.
func NewProcess(kind, instance string) Process {
	p := Process{Kind: kind, Instance: instance, Cold: true}
	_, _ = rand.Read(p.Nonce[:]) // never fails
	return p
}

// A Socket is a connection to the agent on this host. Its methods may be
// called concurrently; they take turns, so a Wait wants a connection of its
// own. After an error that is no *AgentError the connection is of no use.
type Socket struct {
	welcome Welcome

	mu     sync.Mutex
	conn   net.Conn
	reader *frameReader
	out    []byte
	seq    uint32
}

// DialAgent connects and says HELLO. Errors wrap dek.ErrUnavailable (no agent,
// or a cold start without the key service), dek.ErrDenied, dek.ErrInvalid.
func DialAgent(ctx context.Context, path string, p Process) (*Socket, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("%w: no agent at %s: %w: start keyward-agent", dek.ErrUnavailable, path, err)
	}
	s := &Socket{conn: conn, reader: newFrameReader(conn, time.Hour), out: make([]byte, 0, 256)}
	err = s.call(ctx, opHello, func(out []byte, seq uint32) []byte {
		return appendHello(out, seq, hello{kind: p.Kind, instance: p.Instance, nonce: p.Nonce, cold: p.Cold})
	}, func(b []byte) (err error) {
		s.welcome, err = parseHelloReply(b)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return s, nil
}

// Welcome returns what the agent said to HELLO.
func (s *Socket) Welcome() Welcome { return s.welcome }

// Close ends the connection.
func (s *Socket) Close() error { return s.conn.Close() }

// List returns the keyrings of the instance.
func (s *Socket) List(ctx context.Context) (l Listing, err error) {
	err = s.call(ctx, opList, appendList, func(b []byte) (err error) {
		l, err = parseListReply(b)
		return err
	})
	return l, err
}

// Get returns one key; the caller destroys it. Errors wrap dek.ErrDenied,
// dek.ErrUnavailable or dek.ErrNotFound.
func (s *Socket) Get(ctx context.Context, k ServerKey) (key *dek.Key, err error) {
	err = s.call(ctx, opGet, func(out []byte, seq uint32) []byte { return appendGet(out, seq, k) }, func(b []byte) error {
		got, raw, err := parseGetReply(b)
		if err == nil && got != k {
			err = errFrame
		}
		if err != nil {
			return err
		}
		key, err = dek.KeyFrom(raw) // wipes raw
		return err
	})
	return key, err
}

// Wait returns the generation once it differs from the given one, or after the
// timeout (a minute at most).
func (s *Socket) Wait(ctx context.Context, generation uint64, timeout time.Duration) (next uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout+waitSlack)
	defer cancel()
	err = s.call(ctx, opWait, func(out []byte, seq uint32) []byte { return appendWait(out, seq, generation, timeout) }, func(b []byte) (err error) {
		next, err = parseWaitReply(b)
		return err
	})
	return next, err
}

// maxReport is how many usages fit a frame.
const maxReport = 4000

// Report tells which versions this server has asked for, and when.
func (s *Socket) Report(ctx context.Context, usage []ServerUsage) error {
	if len(usage) > maxReport {
		return fmt.Errorf("%w: a report of %d versions: at most %d", dek.ErrInvalid, len(usage), maxReport)
	}
	return s.call(ctx, opReport, func(out []byte, seq uint32) []byte { return appendReport(out, seq, usage) }, func(b []byte) error {
		r := body{b: b}
		return r.end()
	})
}

// call sends one request and reads its reply.
func (s *Socket) call(ctx context.Context, op byte, build func([]byte, uint32) []byte, parse func([]byte) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if end, ok := ctx.Deadline(); ok {
		_ = s.conn.SetDeadline(end)
		defer func() { _ = s.conn.SetDeadline(time.Time{}) }()
	}
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { _ = s.conn.SetDeadline(time.Unix(1, 0)) })
		defer stop()
	}
	s.seq++
	s.out = build(s.out[:0], s.seq)
	if _, err := s.conn.Write(s.out); err != nil {
		return s.broken(ctx, err)
	}
	f, err := s.reader.next()
	if err != nil {
		return s.broken(ctx, err)
	}
	if f.op == opError {
		refused, err := parseError(f.body)
		if err != nil {
			return s.broken(ctx, err)
		}
		return refused
	}
	if f.op != op|opReply || f.seq != s.seq {
		return s.broken(ctx, errFrame)
	}
	if err := parse(f.body); err != nil {
		return s.broken(ctx, err)
	}
	return nil
}

func (s *Socket) broken(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return fmt.Errorf("%w: agent connection: %w", dek.ErrUnavailable, err)
}
