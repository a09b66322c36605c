package hsm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/keyward/keyward/dek"
)

// A link is one life of a child: its process, its socket and the calls under
// way. It ends once, by cause; then every call gets its answer.
type link struct {
	cmd    *exec.Cmd
	conn   *net.UnixConn
	w      *frameWriter
	lanes  [laneCount]chan struct{} // places taken in the child
	id     Identity
	caps   Capabilities
	last   lastWords
	exited chan struct{}
	ended  chan struct{}
	readWG sync.WaitGroup
	seq    atomic.Uint32

	mu    sync.Mutex
	calls map[uint32]*call
	queue [laneCount]workQueue
	cause error // set before ended is closed
}

// A workQueue is what the parent knows of a lane in the child: as many calls
// are with the device as it has workers, the rest stand behind them.
type workQueue struct {
	idle  int // workers without a call
	calls []*call
}

// A call waits for one answer.
type call struct {
	op       byte
	limit    time.Duration
	deadline time.Time // zero until a worker of the child has it; under link.mu
	done     chan struct{}

	// Written by the reader before done is closed.
	body []byte
	key  *dek.Key
	err  error

	abandoned bool // under link.mu: nobody waits any more
}

// startChild starts the child and exchanges hellos. A child that does not
// answer within limit, or before ctx ends, is killed.
func startChild(ctx context.Context, c Config, expect Identity, limit time.Duration) (*link, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: socketpair: %w", dek.ErrUnavailable, err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "token child"), os.NewFile(uintptr(fds[1]), "token parent")
	nc, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, fmt.Errorf("%w: socketpair: %w", dek.ErrUnavailable, err)
	}
	conn, ok := nc.(*net.UnixConn)
	if !ok {
		panic(fmt.Sprintf("hsm: internal error: socketpair is %T", nc))
	}
	l := &link{conn: conn, w: &frameWriter{w: conn}, exited: make(chan struct{}), ended: make(chan struct{}), calls: map[uint32]*call{}}
	l.cmd = exec.Command(c.Child[0], c.Child[1:]...)
	l.cmd.Env = append(os.Environ(), c.Env...)
	l.cmd.Stderr = &l.last
	l.cmd.WaitDelay = time.Second // a module's own daemon may hold stderr open for ever
	l.cmd.ExtraFiles = []*os.File{theirs}
	err = l.cmd.Start()
	theirs.Close() // now: with our copy open, a child's death would not show
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("%w: start token child: %w", dek.ErrPrecondition, err)
	}
	go func() {
		_ = l.cmd.Wait() // ProcessState says how
		close(l.exited)
		_ = conn.CloseRead() // such a daemon may hold the socket, too: then no end of file tells
	}()
	if err := l.hello(ctx, c, expect, limit); err != nil {
		l.close(time.Second)
		return nil, err
	}
	return l, nil
}

// hello sends the configuration and starts the reader on success.
func (l *link) hello(ctx context.Context, c Config, expect Identity, limit time.Duration) error {
	stop := context.AfterFunc(ctx, func() { l.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	l.conn.SetDeadline(time.Now().Add(limit))
	h := hello{c.Module, c.TokenURI, c.PINFile, c.PINState, expect, c.Workers, c.Deadline}
	if err := l.w.send(0, opHello, h.append(nil)); err != nil {
		return fmt.Errorf("%w: token child: %w", dek.ErrUnavailable, err)
	}
	r := newFrameReader(l.conn)
	f, err := r.next()
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			l.kill()
		}
		return fmt.Errorf("%w: token child gave no answer at start: %w", dek.ErrUnavailable, errors.Join(context.Cause(ctx), err))
	}
	if f.code != statusOK {
		return errorOf(f.code, string(f.body))
	}
	d := &decoder{b: f.body}
	l.id, l.caps = parseIdentity(d), parseCapabilities(d)
	if err := d.done(); err != nil {
		return fmt.Errorf("%w: token child: %w hello", dek.ErrUnavailable, err)
	}
	if !stop() {
		return fmt.Errorf("%w: %w", dek.ErrUnavailable, context.Cause(ctx))
	}
	l.conn.SetDeadline(time.Time{})
	for lane := range l.lanes {
		l.queue[lane].idle = laneWorkers(lane, c.Workers)
		l.lanes[lane] = make(chan struct{}, laneWindow*l.queue[lane].idle)
	}
	l.w.order = l.queued
	l.readWG.Go(func() { l.read(r) })
	l.readWG.Go(func() { l.watch(c.Deadline / 8) })
	return nil
}

// read hands answers to calls until the link ends.
func (l *link) read(r *frameReader) {
	for {
		f, err := r.next()
		if err != nil {
			l.end(fmt.Errorf("%w: token child died: %w", dek.ErrUnavailable, err))
			return
		}
		l.mu.Lock()
		c := l.calls[f.seq]
		if c != nil {
			delete(l.calls, f.seq)
			l.queue[laneOf(c.op)].leave(time.Now())
		}
		l.mu.Unlock()
		if c == nil {
			l.end(fmt.Errorf("%w: token child answered a call that nobody made", dek.ErrUnavailable))
			return
		}
		<-l.lanes[laneOf(c.op)]
		c.take(f)
		rebuild := errors.Is(c.err, errRebuild)
		if rebuild {
			l.end(c.err) // first: the caller tries again, and not on this child
		}
		l.finish(c)
		if rebuild {
			return
		}
	}
}

// take copies the answer out of the reader's buffer. Keys go straight into
// locked memory.
func (c *call) take(f frame) {
	switch {
	case f.code != statusOK:
		c.err = errorOf(f.code, string(f.body))
	case c.op == opDecrypt || c.op == opOpen:
		c.key, c.err = dek.KeyFrom(f.body)
	case len(f.body) > 0:
		c.body = append([]byte(nil), f.body...)
	}
}

// finish wakes the caller, or destroys what nobody waits for.
func (l *link) finish(c *call) {
	l.mu.Lock()
	abandoned := c.abandoned
	close(c.done)
	l.mu.Unlock()
	if abandoned {
		c.key.Destroy()
	}
}

// queued puts a call into the queue of its lane, in the order of the wire, which
// is the order in which the child's workers take them.
func (l *link) queued(seq uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.calls[seq]; c != nil {
		l.queue[laneOf(c.op)].enter(c, time.Now())
	}
}

// enter starts the clock of c if a worker is free for it. One that queues has
// none: behind a slow but healthy device, or a key that is being made, waiting
// is no sign of a hang. Link.mu is held.
func (q *workQueue) enter(c *call, now time.Time) {
	if q.idle == 0 {
		q.calls = append(q.calls, c)
		return
	}
	q.idle--
	c.deadline = now.Add(c.limit)
}

// leave gives the worker of an answered call to the next one; link.mu is held.
func (q *workQueue) leave(now time.Time) {
	if len(q.calls) == 0 {
		q.idle++
		return
	}
	next := q.calls[0]
	q.calls = slices.Delete(q.calls, 0, 1) // at most laneWindow per worker
	next.deadline = now.Add(next.limit)
}

// watch ends the link when a call is past its deadline.
func (l *link) watch(period time.Duration) {
	tick := time.NewTicker(max(period, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-l.ended:
			return
		case now := <-tick.C:
			if op := l.overdue(now); op != 0 {
				l.kill()
				l.end(fmt.Errorf("%w: token call %d took too long; its child was killed", dek.ErrUnavailable, op))
				return
			}
		}
	}
}

// overdue returns the opcode of a call past its deadline, or 0.
func (l *link) overdue(now time.Time) byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.calls {
		if !c.deadline.IsZero() && now.After(c.deadline) {
			return c.op
		}
	}
	return 0
}

// do makes one call. The context bounds the wait; the device call, once begun,
// runs on to its own deadline.
func (l *link) do(ctx context.Context, op byte, limit time.Duration, body []byte) (*call, error) {
	select {
	case l.lanes[laneOf(op)] <- struct{}{}:
	case <-l.ended:
		return nil, l.cause
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: token busy: %w", dek.ErrUnavailable, context.Cause(ctx))
	}
	c := &call{op: op, limit: limit, done: make(chan struct{})}
	seq := l.seq.Add(1)
	l.mu.Lock()
	if l.cause != nil {
		l.mu.Unlock()
		return nil, l.cause
	}
	l.calls[seq] = c
	l.mu.Unlock()
	runtime.Gosched() // answers come in groups: let the others queue their next calls, too
	if err := l.w.send(seq, op, body); err != nil {
		l.end(fmt.Errorf("%w: token child died: %w", dek.ErrUnavailable, err))
	}
	select {
	case <-c.done:
		return c, c.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-c.done: // both at once
		return c, c.err
	default:
		c.abandoned = true
		return nil, fmt.Errorf("%w: token: %w", dek.ErrUnavailable, context.Cause(ctx))
	}
}

// end ends the link: calls under way get cause. It may be called many times.
func (l *link) end(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cause != nil {
		return
	}
	l.cause = cause
	close(l.ended)
	for seq, c := range l.calls {
		c.err = cause
		close(c.done)
		delete(l.calls, seq)
	}
}

func (l *link) kill() { _ = l.cmd.Process.Kill() }

// close lets the child finish what its device has begun, for at most limit,
// then kills it, and returns when it is gone.
func (l *link) close(limit time.Duration) {
	l.end(fmt.Errorf("%w: token closed", dek.ErrUnavailable))
	_ = l.conn.CloseWrite()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-l.exited:
	case <-timer.C:
		l.kill()
		<-l.exited
	}
	l.conn.Close()
	l.readWG.Wait()
}

// obituary says how the child ended.
func (l *link) obituary() string {
	select {
	case <-l.exited:
		return l.cmd.ProcessState.String() + l.last.String()
	default:
		return "running"
	}
}

// lastWords keeps why a child crashed, and nothing else of what it or its
// module writes to standard error: a crash prints registers, a tracing module
// prints PINs.
type lastWords struct {
	mu   sync.Mutex
	line []byte
	kept string
}

const maxLine = 200

// Write looks at whole lines; what is longer than maxLine is cut.
func (w *lastWords) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range b {
		if c != '\n' {
			if len(w.line) < maxLine {
				w.line = append(w.line, c)
			}
			continue
		}
		for _, prefix := range []string{"SIG", "panic: ", "fatal error: ", "keyward "} {
			if len(w.kept) < maxLine && strings.HasPrefix(string(w.line), prefix) {
				w.kept += ": " + string(w.line)
			}
		}
		clear(w.line)
		w.line = w.line[:0]
	}
	return len(b), nil
}

func (w *lastWords) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.kept
}
