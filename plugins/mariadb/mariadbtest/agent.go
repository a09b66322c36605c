package mariadbtest

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// Operations of the agent socket protocol v1 (connector/PROTOCOL.md).
const (
	OpHello  = 0x01
	OpList   = 0x02
	OpGet    = 0x03
	OpWait   = 0x04
	OpReport = 0x05
	opError  = 0xff
)

// Error classes of an ERROR frame.
const (
	ClassInvalid     = 1
	ClassDenied      = 2
	ClassUnavailable = 3
	ClassNotFound    = 4
	ClassInternal    = 5
)

// States of a keyring in a LIST.
const (
	StateActive = 1
	StateDenied = 2
	StateStale  = 3
)

const maxFrame = 65536

// A Request is what the scripted agent was asked.
type Request struct {
	Op             byte
	KeyID, Version uint32 // OpGet
	Cold           bool   // OpHello
}

// A Fault says how the agent answers a request instead of rightly. The zero
// Fault answers rightly.
type Fault struct {
	// Class, if not 0, answers with an ERROR frame of that class and Text.
	Class uint16
	Text  string
	// Delay answers late; Hang never, until the agent stops.
	Delay time.Duration
	Hang  bool
	// Close closes the connection instead of answering.
	Close bool
	// Mutate changes the frame (length prefix included) before it is sent; the
	// connection is closed after it.
	Mutate func(frame []byte) []byte
}

// Use is one line of a REPORT.
type Use struct{ KeyID, Version uint32 }

type keyring struct {
	name   string
	state  byte
	latest uint32
	keys   map[uint32][]byte
	hidden map[uint32]bool // not in LIST
}

// An Agent is a scripted Keyward agent: the whole protocol, with keys of its
// own making and whatever faults a test orders. Its methods may be called
// concurrently; changes are seen by waiting clients at once.
type Agent struct {
	path string

	mu         sync.Mutex
	listener   net.Listener
	conns      map[net.Conn]bool
	stopped    chan struct{} // closed by Stop
	changed    chan struct{} // closed and replaced at each change
	generation uint64
	rings      map[uint32]*keyring
	fault      func(Request) Fault
	count      map[Request]int
	uses       map[Use]bool
	serving    sync.WaitGroup
}

// NewAgent makes an agent for the socket path; Start opens it.
func NewAgent(path string) *Agent {
	return &Agent{path: path, conns: map[net.Conn]bool{}, changed: make(chan struct{}), generation: 1,
		rings: map[uint32]*keyring{}, count: map[Request]int{}, uses: map[Use]bool{}}
}

// Path is the socket's path.
func (a *Agent) Path() string { return a.path }

// Start opens the socket.
func (a *Agent) Start() error {
	os.Remove(a.path)
	l, err := net.Listen("unix", a.path)
	if err != nil {
		return fmt.Errorf("mariadbtest: agent: %w", err)
	}
	if err := os.Chmod(a.path, 0o666); err != nil { //nolint:gosec // a test's socket in a directory of its own
		return err
	}
	stopped := make(chan struct{})
	a.mu.Lock()
	a.listener, a.stopped = l, stopped
	a.mu.Unlock()
	a.serving.Add(1)
	go a.accept(l, stopped)
	return nil
}

// Stop closes the socket and every connection, as a killed agent would.
func (a *Agent) Stop() {
	a.mu.Lock()
	if a.listener != nil {
		a.listener.Close()
		close(a.stopped)
		a.listener = nil
	}
	for c := range a.conns {
		c.Close()
	}
	a.mu.Unlock()
	a.serving.Wait()
}

// Add makes a keyring with version 1.
func (a *Agent) Add(id uint32, name string) {
	a.change(func() {
		a.rings[id] = &keyring{name: name, state: StateActive, latest: 1, keys: map[uint32][]byte{1: newKey()}, hidden: map[uint32]bool{}}
	})
}

// Roll makes the next version, two above the largest, and returns it.
func (a *Agent) Roll(id uint32) uint32 {
	var v uint32
	a.change(func() {
		r := a.rings[id]
		r.latest += 2
		v = r.latest
		r.keys[v] = newKey()
	})
	return v
}

// SetState sets a keyring's state; StateDenied refuses every GET of it.
func (a *Agent) SetState(id uint32, state byte) {
	a.change(func() { a.rings[id].state = state })
}

// Hide leaves a version out of LIST. GET still gives it.
func (a *Agent) Hide(id, version uint32) {
	a.change(func() { a.rings[id].hidden[version] = true })
}

// SetFault sets what decides about the answer of each request; nil answers all
// rightly.
func (a *Agent) SetFault(f func(Request) Fault) {
	a.change(func() { a.fault = f })
}

// Key returns the bytes of a key version.
func (a *Agent) Key(id, version uint32) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.rings[id].keys[version])
}

// Count is how many requests like r came in, faults included.
func (a *Agent) Count(r Request) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.count[r]
}

// Uses are all key versions that were reported.
func (a *Agent) Uses() []Use {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Keys(a.uses))
}

func newKey() []byte {
	b := make([]byte, 32)
	rand.Read(b)
	return b
}

// change runs f and wakes those who WAIT.
func (a *Agent) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	a.generation++
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *Agent) accept(l net.Listener, stopped chan struct{}) {
	defer a.serving.Done()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		a.mu.Lock()
		if a.listener != l {
			c.Close()
			a.mu.Unlock()
			return
		}
		a.conns[c] = true
		a.serving.Add(1)
		a.mu.Unlock()
		go a.serve(c, stopped)
	}
}

func (a *Agent) serve(c net.Conn, stopped chan struct{}) {
	defer a.serving.Done()
	defer func() {
		a.mu.Lock()
		delete(a.conns, c)
		a.mu.Unlock()
		c.Close()
	}()
	for {
		frame, err := readFrame(c)
		if err != nil {
			return
		}
		reply, again := a.answer(frame, stopped)
		if reply == nil {
			return
		}
		if _, err := c.Write(reply); err != nil || !again {
			return
		}
	}
}

// readFrame returns op, seq and body without the length.
func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n < 5 || n > maxFrame {
		return nil, errors.New("frame length")
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

// answer returns the reply frame, nil to close, and whether the connection
// stays open after it.
func (a *Agent) answer(frame []byte, stopped chan struct{}) (reply []byte, again bool) {
	op, seq, body := frame[0], frame[1:5], frame[5:]
	req, ok := parseRequest(op, body)
	if !ok {
		return pack(opError, seq, errorBody(ClassInvalid, "malformed request")), false
	}
	a.mu.Lock()
	a.count[req]++
	var f Fault
	if a.fault != nil {
		f = a.fault(req)
	}
	a.mu.Unlock()
	if !pause(f, stopped) || f.Close {
		return nil, false
	}
	if f.Class != 0 {
		op, body = opError, errorBody(f.Class, f.Text)
	} else {
		op, body = a.perform(req, body, stopped)
	}
	reply = pack(op, seq, body)
	if f.Mutate != nil {
		return f.Mutate(reply), false
	}
	return reply, true
}

// pause sits out a delay or hang; false if the agent stopped meanwhile.
func pause(f Fault, stopped chan struct{}) bool {
	var late <-chan time.Time
	switch {
	case f.Hang:
	case f.Delay > 0:
		late = time.After(f.Delay)
	default:
		return true
	}
	select {
	case <-stopped:
		return false
	case <-late:
		return true
	}
}

func parseRequest(op byte, b []byte) (Request, bool) {
	r := Request{Op: op}
	switch op {
	case OpHello:
		// "KWA1", u16 1, string "mariadb", string instance, 16 bytes, u8
		if len(b) < 4+2+2+7+2+16+1 || string(b[:6]) != "KWA1\x00\x01" || string(b[6:15]) != "\x00\x07mariadb" {
			return r, false
		}
		n := int(binary.BigEndian.Uint16(b[15:]))
		r.Cold = b[len(b)-1] == 1
		return r, len(b) == 17+n+17 && b[len(b)-1] <= 1
	case OpList:
		return r, len(b) == 0
	case OpGet:
		if len(b) != 8 {
			return r, false
		}
		r.KeyID, r.Version = binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
		return r, true
	case OpWait:
		return r, len(b) == 12
	case OpReport:
		return r, len(b) >= 2 && len(b) == 2+16*int(binary.BigEndian.Uint16(b))
	}
	return r, false
}

func pack(op byte, seq, body []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(5+len(body)))
	b = append(append(b, op), seq...)
	return append(b, body...)
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

func errorBody(class uint16, text string) []byte {
	return appendString(binary.BigEndian.AppendUint16(nil, class), text)
}

// perform carries out a well-formed request.
func (a *Agent) perform(r Request, body []byte, stopped chan struct{}) (op byte, reply []byte) {
	switch r.Op {
	case OpHello:
		reply = appendString(appendString(nil, "orders"), "kms1.example:7443,kms2.example:7443")
		reply = binary.BigEndian.AppendUint32(reply, 5000)
	case OpList:
		reply = a.list()
	case OpGet:
		return a.get(r)
	case OpWait:
		reply = a.wait(binary.BigEndian.Uint64(body), time.Duration(binary.BigEndian.Uint32(body[8:]))*time.Millisecond, stopped)
	case OpReport:
		a.mu.Lock()
		for b := body[2:]; len(b) > 0; b = b[16:] {
			a.uses[Use{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])}] = true
		}
		a.mu.Unlock()
	}
	return r.Op | 0x80, reply
}

func (a *Agent) list() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	b := binary.BigEndian.AppendUint64(nil, a.generation)
	b = binary.BigEndian.AppendUint16(b, uint16(len(a.rings)))
	for id, r := range a.rings {
		b = binary.BigEndian.AppendUint32(b, id)
		b = binary.BigEndian.AppendUint32(b, r.latest)
		b = appendString(append(b, r.state), r.name)
		versions := slices.DeleteFunc(slices.Sorted(maps.Keys(r.keys)), func(v uint32) bool { return r.hidden[v] })
		b = binary.BigEndian.AppendUint16(b, uint16(len(versions)))
		for _, v := range versions {
			b = binary.BigEndian.AppendUint32(b, v)
		}
	}
	return b
}

func (a *Agent) get(r Request) (op byte, reply []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ring := a.rings[r.KeyID]
	if ring == nil || ring.keys[r.Version] == nil {
		return opError, errorBody(ClassNotFound, fmt.Sprintf("key id %d version %d does not exist", r.KeyID, r.Version))
	}
	if ring.state == StateDenied {
		return opError, errorBody(ClassDenied, DeniedText(ring.name, r.Version))
	}
	b := binary.BigEndian.AppendUint32(nil, r.KeyID)
	b = binary.BigEndian.AppendUint32(b, r.Version)
	return OpGet | 0x80, append(append(b, 32), ring.keys[r.Version]...)
}

// DeniedText is the message of a GET that is denied.
func DeniedText(ring string, version uint32) string {
	return fmt.Sprintf("keyring %s version %d: denied by kms1.example:7443; remedy: the security officer runs: keyward key enable", ring, version)
}

func (a *Agent) wait(known uint64, limit time.Duration, stopped chan struct{}) []byte {
	a.mu.Lock()
	changed, now := a.changed, a.generation
	a.mu.Unlock()
	if now == known {
		select {
		case <-changed:
		case <-time.After(limit):
		case <-stopped:
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return binary.BigEndian.AppendUint64(nil, a.generation)
}
