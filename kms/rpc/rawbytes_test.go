package rpc_test

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/keyward/keyward/kms/kmspb"
)

// frame is one frame of HTTP/2 (RFC 9113 section 4.1) that says it has length
// bytes.
func frame(length int, kind, flags byte, stream uint32, body ...byte) []byte {
	b := []byte{byte(length >> 16), byte(length >> 8), byte(length), kind, flags}
	return append(binary.BigEndian.AppendUint32(b, stream), body...)
}

// opening is what a client says first: preface and empty settings.
func opening() []byte {
	return append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frame(0, 4, 0, 0)...)
}

// call is a whole connection: a stream for GetStatus with body as its data.
func call(body []byte, end bool) []byte {
	var block []byte // literal fields, RFC 7541 section 6.2.2
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", kmspb.Admin_GetStatus_FullMethodName},
		{":authority", "kms"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		block = append(append(block, 0, byte(len(h[0]))), h[0]...)
		block = append(append(block, byte(len(h[1]))), h[1]...)
	}
	flags := byte(0)
	if end {
		flags = 1
	}
	b := append(opening(), frame(len(block), 1, 4, 1, block...)...)
	return append(b, frame(len(body), 0, flags, 1, body...)...)
}

// message is gRPC's frame of a message that says it has size bytes.
func message(compressed byte, size uint32, body ...byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{compressed}, size), body...)
}

// brokenFrames are what no client of ours sends.
func brokenFrames() map[string][]byte {
	after := func(b []byte) []byte { return append(opening(), b...) }
	return map[string][]byte{
		"HTTP/1":                     []byte("GET / HTTP/1.1\r\nHost: kms\r\n\r\n"),
		"zeros":                      make([]byte, 4096),
		"half a preface":             opening()[:10],
		"preface alone":              opening()[:24],
		"frame of 16 MiB":            after(frame(1<<24-1, 0, 0, 1)),
		"frame longer than sent":     after(frame(100, 0, 0, 1, 1, 2, 3)),
		"settings of five bytes":     after(frame(5, 4, 0, 0, 1, 2, 3, 4, 5)),
		"data without a stream":      after(frame(3, 0, 1, 1, 1, 2, 3)),
		"headers that are no HPACK":  after(frame(4, 1, 5, 1, 0xff, 0xff, 0xff, 0xff)),
		"frame of an unknown kind":   after(frame(2, 0xee, 0xff, 1, 1, 2)),
		"message cut in its length":  call(message(0, 0)[:3], true),
		"message cut in its body":    call(message(0, 50, 1, 2, 3), true),
		"message of 4 GiB":           call(message(0, 1<<32-1), true),
		"message said to be zipped":  call(message(1, 2, 0x1f, 0x8b), true),
		"message that never comes":   call(message(0, 50, 1), false),
		"unknown flag of a message":  call(message(7, 1, 0), true),
		"two messages where one may": call(append(message(0, 0), message(0, 0)...), true),
	}
}

// converse sends bytes, listens for a while and then ends its half.
func converse(t *testing.T, dial func() (net.Conn, error), what string, send []byte) {
	c, err := dial()
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	_, _ = c.Write(send) // the door may have closed already
	_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	reply, err := io.ReadAll(c)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return // the door ended it
	}
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		_ = h.CloseWrite()
	}
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the connection is still open after 20 s; it said %q", what, reply)
	}
}

// TestBrokenFrames sends them below gRPC, at the port behind a good certificate
// and at the control socket: every connection ends, none reaches the service,
// and a good call beside them works.
func TestBrokenFrames(t *testing.T) {
	d := openDoor(t)
	cert := certificate(t, d.authority, "person/a")
	for door, dial := range map[string]func() (net.Conn, error){
		"port":    func() (net.Conn, error) { return tls.Dial("tcp", d.address, d.tls(cert)) },
		"control": func() (net.Conn, error) { return net.Dial("unix", d.socket) },
	} {
		before := d.house.calls.Load()
		var all sync.WaitGroup
		for name, send := range brokenFrames() {
			all.Go(func() { converse(t, dial, name+" at the "+door, send) })
		}
		all.Wait()
		if n := d.house.calls.Load() - before; n != 0 {
			t.Errorf("%d broken calls at the %s reached the service", n, door)
		}
		converse(t, dial, "a good call at the "+door, call(message(0, 0), true))
		if n := d.house.calls.Load() - before; n != 1 { // else the test proves nothing
			t.Errorf("a good call at the %s reached the service %d times, want 1", door, n)
		}
	}
	if _, s := exchange(t, d.dial(t, cert), kmspb.Admin_GetStatus_FullMethodName, nil); s.Code() != codes.OK {
		t.Errorf("a good call afterwards: %v", s)
	}
}
