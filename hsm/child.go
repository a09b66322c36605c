package hsm

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/keyward/keyward/dek"
	"golang.org/x/sys/unix"
)

// childFD is where the child finds its end of the socketpair.
const childFD = 3

// The lanes of a child: each has its own queue, workers and sessions, so that
// making a key does not hold up unwraps.
const (
	laneRSA   = iota // Config.Workers workers
	laneLight        // AES and EC: one worker, since they don't scale on SoftHSM
	laneAdmin        // one worker: crypto11, searches
	laneCount
)

// laneOf maps opcodes to lanes.
func laneOf(op byte) int {
	switch op {
	case opDecrypt, opHealth:
		return laneRSA
	case opSign, opSeal, opOpen:
		return laneLight
	}
	return laneAdmin
}

// laneWindow is how many requests the parent keeps in the child per worker:
// enough that a worker never waits for the socket, few enough that callers who
// give up cost little device time.
const laneWindow = 8

func laneWorkers(lane, workers int) int {
	if lane == laneRSA {
		return workers
	}
	return 1
}

// RunChild is the whole life of a token child: the program given as
// [Config.Child] calls it and exits with its result. It serves the socket on
// descriptor 3 until the parent closes it, finishing what the device has begun
// (SoftHSM loses its token when killed at the wrong moment). It ignores
// SIGINT and SIGTERM, which reach the whole process group: the parent decides.
// 0: parent closed; 1: the token could not be opened or the socket broke; 2: not
// started as a child.
func RunChild(ctx context.Context) int {
	signal.Ignore(os.Interrupt, syscall.SIGTERM)
	// No core dump, no ptrace: the PIN and data keys pass through this process.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return 1
	}
	f := os.NewFile(childFD, "token socket")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		fmt.Fprintln(os.Stderr, "keyward token child: start me as a child: descriptor 3 is not a socket")
		return 2
	}
	defer conn.Close()
	if err := serveChild(ctx, conn); err != nil {
		return 1
	}
	return 0
}

// serveChild opens the device that the first frame names and serves requests.
func serveChild(ctx context.Context, conn net.Conn) error {
	r, w := newFrameReader(conn), &frameWriter{w: conn}
	first, err := r.next()
	if err != nil {
		return err
	}
	h, err := parseHello(first.body)
	if err != nil || first.code != opHello {
		return errors.Join(errShort, err)
	}
	// Workers of all lanes sit in C, each holding a P; the socket needs one more.
	runtime.GOMAXPROCS(h.workers + laneCount)
	d, err := openDevice(ctx, h)
	if err != nil {
		status, text := statusOf(err)
		return errors.Join(err, w.send(first.seq, status, []byte(text)))
	}
	c := &child{d: d, w: w, patience: time.Duration(h.workers) * lateFlush}
	if err := c.start(h.workers); err != nil {
		status, text := statusOf(err)
		return errors.Join(err, w.send(first.seq, status, []byte(text)))
	}
	if err := w.send(first.seq, statusOK, d.caps.append(d.id.append(nil))); err != nil {
		return err
	}
	err = c.read(r)
	if !c.drain(h.deadline) {
		return errors.New("a device call did not end")
	}
	return errors.Join(err, d.maker.close())
}

// child is the running state of a token child.
type child struct {
	d     *device
	w     *frameWriter
	lanes [laneCount]chan *request
	pool  sync.Pool
	wg    sync.WaitGroup

	// patience over the time of one operation is how many answers may gather
	// while there is more to do.
	patience time.Duration
}

// A request is one frame with a buffer of its own.
type request struct {
	seq   uint32
	op    byte
	n     int
	store [maxRequest]byte
}

// maxRequest bounds request bodies; the largest is that of opOpen: 16 bytes of
// id, a place of maxPlace and a sealed key of maxSealed, each after its length.
const maxRequest = 8192

// start opens the sessions and starts the workers.
func (c *child) start(workers int) error {
	for lane := range c.lanes {
		n := laneWorkers(lane, workers)
		c.lanes[lane] = make(chan *request, laneWindow*n)
		for range n {
			s, err := c.d.newSession()
			if err != nil {
				return classed("open session", err)
			}
			c.wg.Go(func() { c.work(s, c.lanes[lane]) })
		}
	}
	return nil
}

// read dispatches frames until the parent closes its end.
func (c *child) read(r *frameReader) error {
	defer func() {
		for _, l := range c.lanes {
			close(l)
		}
	}()
	for {
		f, err := r.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if f.code <= opHello || f.code > opLast || len(f.body) > maxRequest {
			return fmt.Errorf("%w request %d of %d bytes", errShort, f.code, len(f.body))
		}
		q, ok := c.pool.Get().(*request)
		if !ok {
			q = new(request)
		}
		q.seq, q.op, q.n = f.seq, f.code, copy(q.store[:], f.body)
		c.lanes[laneOf(f.code)] <- q
	}
}

// drain waits for the workers and reports whether they all ended.
func (c *child) drain(limit time.Duration) bool {
	done := make(chan struct{})
	go func() {
		c.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(limit):
		return false
	}
}

// work serves one lane with one session.
func (c *child) work(s *session, lane <-chan *request) {
	defer s.close()
	for q := range lane {
		begin := time.Now()
		body, err := c.serve(s, q.op, q.store[:q.n])
		status := byte(statusOK)
		if err != nil {
			var text string
			status, text = statusOf(err)
			body = []byte(text)
		}
		batch := 1
		if len(lane) > 0 { // busy: a short wait costs nobody anything
			took := max(time.Since(begin), 1)               // a coarse clock may show none
			batch += min(int(c.patience/took), cap(lane)/2) // the other half feeds the workers
		}
		// An error means that the parent is gone; the reader sees it, too.
		_ = c.w.post(q.seq, status, body, batch)
		clear(s.out[:])
		clear(q.store[:q.n])
		c.pool.Put(q)
	}
}

// serve runs one request. The answer may alias s.out.
func (c *child) serve(s *session, op byte, body []byte) ([]byte, error) {
	d := &decoder{b: body}
	bad := func() error { return fmt.Errorf("%w: token request %d", dek.ErrInvalid, op) }
	switch op {
	case opDecrypt:
		id, h, inner := d.id(), codeHash(d.u8()), d.rest()
		if d.done() != nil || h == 0 {
			return nil, bad()
		}
		return s.decryptMaster(id, h, inner)
	case opHealth:
		return nil, s.health()
	case opSign:
		id, digest := d.id(), d.take(32)
		if d.done() != nil {
			return nil, bad()
		}
		sig, _, err := s.sign(kindSigner, id, digest)
		return sig, err
	case opSeal:
		id, place, plain := d.id(), d.bytes16(), d.take(dek.KeySize)
		if d.done() != nil {
			return nil, bad()
		}
		return s.seal(id, place, plain)
	case opOpen:
		id, place, sealed := d.id(), d.bytes16(), d.bytes16()
		if d.done() != nil {
			return nil, bad()
		}
		return s.open(id, place, sealed)
	}
	return c.serveAdmin(s, op, d)
}

// serveAdmin runs the requests of the admin lane.
func (c *child) serveAdmin(s *session, op byte, d *decoder) ([]byte, error) {
	switch op {
	case opGenerate:
		kind, bits, id := objectKind(d.u8()), int(d.u16()), d.id()
		if d.done() == nil {
			return spki(s.generate(kind, id, bits))
		}
	case opFind:
		kind, id := objectKind(d.u8()), d.id()
		if d.done() == nil {
			return spki(s.findPair(kind, id))
		}
	case opDestroy:
		id := d.id()
		if d.done() == nil {
			return nil, s.destroy(id)
		}
	case opObjects:
		if d.done() == nil {
			ids, err := s.objects()
			body := make([]byte, 0, 16*len(ids))
			for _, id := range ids {
				body = append(body, id[:]...)
			}
			return body, err
		}
	}
	return nil, fmt.Errorf("%w: token request %d", dek.ErrInvalid, op)
}

// spki encodes a public key; nil gives nothing.
func spki(pub crypto.PublicKey, err error) ([]byte, error) {
	if err != nil || pub == nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", dek.ErrCorrupt, err)
	}
	return der, nil
}
