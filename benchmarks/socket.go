package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"syscall"
	"time"

	"github.com/keyward/keyward/connector"
)

const (
	socketCallers = 8
	socketSpan    = 2 * time.Second
	// rssKeys is what the agent's memory is measured with. One instance has at
	// most 64 keyrings, so each of these is rolled often.
	rssKeys  = 10_000
	rssRings = 64
	// rssSettle lies between the last roll and the measurement.
	rssSettle = 10 * time.Second
)

// GET of the agent's protocol (connector/PROTOCOL.md): length, op 3, sequence,
// key id, version; and its reply: the same and 32 key bytes after their length.
const (
	opGet        = 3
	getBytes     = 4 + 1 + 4 + 4 + 4
	getReply     = opGet | 0x80
	getReplySize = 4 + 1 + 4 + 4 + 4 + 1 + 32
)

// getFrame is a request for version 1 of key 1.
func getFrame() []byte {
	b := binary.BigEndian.AppendUint32(nil, getBytes-4)
	b = append(b, opGet, 0, 0, 0, 1)
	return append(b, 0, 0, 0, 1, 0, 0, 0, 1)
}

// A rig of service and agent, with one instance whose keyrings are those of
// the vault. Any process of this user may use it.
type agentRig struct {
	*service
	agent  *process
	socket string
}

func (b *bench) newAgentRig(ctx context.Context, rings int) (r *agentRig, err error) {
	s, err := b.newService(ctx, false)
	if err != nil {
		return nil, err
	}
	r = &agentRig{service: s, socket: filepath.Join(b.dir, "run", "agent.sock")}
	if err := r.registerAgent(ctx, rings); err != nil {
		return nil, errors.Join(err, r.stop())
	}
	return r, nil
}

func (r *agentRig) stop() error {
	var err error
	if r.agent != nil {
		err = r.agent.end(syscall.SIGTERM)
	}
	return errors.Join(err, r.service.stop())
}

// registerAgent does what officer and DBA do, and starts the agent.
func (r *agentRig) registerAgent(ctx context.Context, rings int) error {
	t, err := r.prepare(ctx, rings)
	if err != nil {
		return err
	}
	state, secret := r.path("agent"), r.path("hostsecret/secret")
	id, err := connector.Enroll(ctx, t, connector.EnrollOptions{Dir: state, HostSecretFile: secret})
	if err != nil {
		return err
	}
	id.Close()
	me, err := user.Current()
	if err != nil {
		return err
	}
	f := connector.AgentFile{Socket: r.socket, StateDir: state, HostSecretFile: secret,
		Instances: []connector.AgentInstance{{Name: t.Instance, Kind: t.Kind, User: me.Username}}}
	text, err := f.Encode()
	if err != nil {
		return err
	}
	if err := os.WriteFile(r.path("agent.json"), text, 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), filepath.Join(r.bin, "keyward-agent"), "--config", r.path("agent.json"))
	if r.agent, err = spawn(cmd, r.path("agent.log")); err != nil {
		return err
	}
	return r.agent.listening(ctx, "unix", r.socket)
}

// socketGet compares GETs of a cached key, on 8 connections, with an echo of
// frames of the same sizes by the barest server there can be.
func socketGet(ctx context.Context, b *bench) (results []Result, err error) {
	r, err := b.newAgentRig(ctx, 1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.stop()) }()
	ours, err := r.admitted(ctx, socketCallers)
	defer closeAll(ours)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(b.dir, "echo.sock")
	echo, err := spawn(helper(ctx, "helper-echo", path), filepath.Join(b.dir, "echo.log"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, echo.end(syscall.SIGKILL)) }()
	if err := echo.listening(ctx, "unix", path); err != nil {
		return nil, err
	}
	theirs, err := dialAll(path, socketCallers)
	defer closeAll(theirs)
	if err != nil {
		return nil, err
	}
	got, err := b.interleave(ctx,
		func(ctx context.Context) (sample, error) { return b.exchange(ctx, ours, r.agent.pid()) },
		func(ctx context.Context) (sample, error) { return b.exchange(ctx, theirs, echo.pid()) })
	if err != nil {
		return nil, err
	}
	const against = "bare framed echo of the same sizes, 8 callers"
	return []Result{
		question{name: "socket/get", against: against, unit: "requests/s", goal: ">= 0.5"}.compare(got[0][0], got[1][0]),
		question{name: "socket/get/cpu", against: against, unit: "us server CPU/request", lessIsBetter: true}.compare(got[0][1], got[1][1]),
	}, nil
}

// exchange has each connection's caller send a GET and read its reply, over
// and over: requests a second and the server's CPU us for each.
func (b *bench) exchange(ctx context.Context, conns []net.Conn, server int) (sample, error) {
	before, err := cpuTime(server)
	if err != nil {
		return nil, err
	}
	request := getFrame()
	replies := make([][getReplySize]byte, len(conns))
	start := time.Now()
	perSecond, err := rate(ctx, len(conns), b.span(socketSpan), func(_ context.Context, caller, _ int) error {
		reply := replies[caller][:]
		if _, err := conns[caller].Write(request); err != nil {
			return err
		}
		if _, err := io.ReadFull(conns[caller], reply); err != nil {
			return err
		}
		if reply[4] != getReply {
			return fmt.Errorf("the reply has op 0x%02x", reply[4])
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	took := time.Since(start).Seconds()
	after, err := cpuTime(server)
	return sample{perSecond, float64((after - before).Microseconds()) / (perSecond * took)}, err
}

// admitted opens connections that have said HELLO as one process.
func (r *agentRig) admitted(ctx context.Context, n int) ([]net.Conn, error) {
	p := connector.NewProcess("mariadb", benchInstance)
	s, err := connector.DialAgent(ctx, r.socket, p)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	conns, err := dialAll(r.socket, n)
	if err != nil {
		return conns, err
	}
	for _, c := range conns {
		if err := sayHello(c, p); err != nil {
			return conns, err
		}
	}
	return conns, nil
}

// sayHello introduces a connection of a process that the agent knows.
func sayHello(c net.Conn, p connector.Process) error {
	body := append([]byte{1, 0, 0, 0, 0}, "KWA1\x00\x01"...)
	for _, s := range []string{p.Kind, p.Instance} {
		body = append(binary.BigEndian.AppendUint16(body, uint16(len(s))), s...) //nolint:gosec // short names
	}
	body = append(append(body, p.Nonce[:]...), 0)
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...) //nolint:gosec // as above
	if _, err := c.Write(frame); err != nil {
		return err
	}
	op, _, err := readFrame(c)
	if err == nil && op != 0x81 {
		err = fmt.Errorf("HELLO was answered with op 0x%02x", op)
	}
	return err
}

func readFrame(c net.Conn) (op byte, rest []byte, err error) {
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n < 5 || n > 1<<16 {
		return 0, nil, fmt.Errorf("a frame of %d bytes", n)
	}
	b := make([]byte, n)
	_, err = io.ReadFull(c, b)
	return b[0], b[1:], err
}

func dialAll(path string, n int) ([]net.Conn, error) {
	var conns []net.Conn
	for range n {
		c, err := net.Dial("unix", path)
		if err != nil {
			return conns, err
		}
		conns = append(conns, c)
	}
	return conns, nil
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		_ = c.Close() // nothing is under way
	}
}

// echoServer answers each frame of a GET's size with one of its reply's size,
// until it is ended. Argument: the socket's path.
func echoServer(args []string, _ io.Writer) error {
	if len(args) != 1 {
		return errors.New("want SOCKET")
	}
	l, err := net.Listen("unix", args[0])
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go echo(c)
	}
}

func echo(c net.Conn) {
	defer c.Close()
	var request [getBytes]byte
	reply := make([]byte, getReplySize)
	binary.BigEndian.PutUint32(reply, getReplySize-4)
	reply[4] = getReply
	for {
		if _, err := io.ReadFull(c, request[:]); err != nil {
			return
		}
		copy(reply[5:], request[5:])
		if _, err := c.Write(reply); err != nil {
			return
		}
	}
}

// agentRSS measures the agent with 10,000 keys in its cache, all of which it
// has handed out.
func agentRSS(ctx context.Context, b *bench) (results []Result, err error) {
	rings, keys := b.pick(rssRings, 4), b.pick(rssKeys, 40)
	r, err := b.newAgentRig(ctx, rings)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.stop()) }()
	s, err := connector.DialAgent(ctx, r.socket, connector.NewProcess("mariadb", benchInstance))
	if err != nil {
		return nil, err
	}
	defer s.Close()
	idle, err := memory(r.agent.pid(), "VmRSS")
	if err != nil {
		return nil, err
	}
	if err := r.growTo(ctx, s, rings, keys); err != nil {
		return nil, err
	}
	select { // a collection and the return of pages to the system
	case <-time.After(b.span(rssSettle)):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	full, err := memory(r.agent.pid(), "VmRSS")
	if err != nil {
		return nil, err
	}
	most, err := memory(r.agent.pid(), "VmHWM")
	return []Result{
		limit("agent/rss", fmt.Sprintf("MB with %d cached keys", keys), []float64{full}, 30),
		limit("agent/rss/peak", "MB at most, while the keys came", []float64{most}, 30),
		limit("agent/rss/idle", fmt.Sprintf("MB with %d cached keys", rings), []float64{idle}, 30),
	}, err
}

// growTo rolls keyrings until the agent lists and has handed out all keys.
func (r *agentRig) growTo(ctx context.Context, s *connector.Socket, rings, keys int) error {
	if err := r.roll(ctx, rings, keys); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		l, err := s.List(ctx)
		if err != nil {
			return err
		}
		var have []connector.ServerKey
		for _, k := range l.Keyrings {
			for _, v := range k.Versions {
				have = append(have, connector.ServerKey{ID: k.ID, Version: v})
			}
		}
		if len(have) >= keys {
			return getAll(ctx, s, have)
		}
		// A Wait that times out is no error; ctx bounds the whole.
		if _, err := s.Wait(ctx, l.Generation, time.Second); err != nil {
			return fmt.Errorf("%d of %d keys listed: %w", len(have), keys, err)
		}
	}
}

func getAll(ctx context.Context, s *connector.Socket, keys []connector.ServerKey) error {
	for _, k := range keys {
		key, err := s.Get(ctx, k)
		if err != nil {
			return fmt.Errorf("key %d version %d: %w", k.ID, k.Version, err)
		}
		key.Destroy()
	}
	return nil
}
