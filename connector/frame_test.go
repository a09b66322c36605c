package connector_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

var update = flag.Bool("update", false, "write golden files")

const goldenFile = "testdata/frames.txt"

// readGolden returns the frames of testdata/frames.txt.
func readGolden(t testing.TB) map[string][]byte {
	frames := map[string][]byte{}
	for line := range strings.Lines(string(must(os.ReadFile(goldenFile)))) {
		name, digits, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			t.Fatalf("%s: %q", goldenFile, line)
		}
		frames[name] = must(hex.DecodeString(strings.TrimSpace(digits)))
	}
	return frames
}

func TestGoldenFrames(t *testing.T) {
	got := connector.GoldenFrames()
	if *update {
		var b bytes.Buffer
		for _, name := range slices.Sorted(maps.Keys(got)) {
			fmt.Fprintf(&b, "%s %x\n", name, got[name])
		}
		if err := os.WriteFile(goldenFile, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := readGolden(t)
	if len(got) != len(want) || len(want) < 12 {
		t.Errorf("%d frames, %d golden", len(got), len(want))
	}
	for name, b := range want {
		if !bytes.Equal(got[name], b) {
			t.Errorf("%s: got %x, want %x", name, got[name], b)
		}
		again, err := connector.Recode(b[4], binary.BigEndian.Uint32(b[5:]), b[9:])
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: parsed and encoded: %x, %v", name, again, err)
		}
	}
}

// FuzzFrameBody: what parses encodes to the same bytes; nothing else is taken.
func FuzzFrameBody(f *testing.F) {
	seeds := 0
	for _, b := range readGolden(f) {
		f.Add(b[4], b[9:])
		f.Add(b[4], b[9:len(b)-min(1, len(b)-9)])
		seeds++
	}
	if seeds < 12 {
		f.Fatalf("%d seeds", seeds)
	}
	f.Fuzz(func(t *testing.T, op byte, body []byte) {
		if len(body) > 65531 {
			return
		}
		out, err := connector.Recode(op, 7, body)
		if err != nil {
			if !errors.Is(err, dek.ErrInvalid) {
				t.Fatalf("class of %v", err)
			}
			return
		}
		if connector.IsWait(op) && binary.BigEndian.Uint32(body[8:]) > 60_000 {
			return // cut to the maximum
		}
		if !bytes.Equal(out[9:], body) && len(body) < 4096 {
			t.Fatalf("op %#x: %x became %x", op, body, out[9:])
		}
	})
}

// FuzzFrameStream: any bytes in any pieces give frames or an error, and never
// more than was sent.
func FuzzFrameStream(f *testing.F) {
	for _, b := range readGolden(f) {
		f.Add(b, uint8(3))
		f.Add(append(b[:len(b):len(b)], b...), uint8(200))
	}
	f.Fuzz(func(t *testing.T, stream []byte, piece uint8) {
		a, b := net.Pipe()
		go func() {
			for len(stream) > 0 {
				n := min(len(stream), int(piece)+1)
				if _, err := a.Write(stream[:n]); err != nil {
					return
				}
				stream = stream[n:]
			}
			_ = a.Close()
		}()
		defer b.Close()
		_, _, body, err := connector.ReadFrame(b, time.Second)
		if err == nil && len(body) > 65531 {
			t.Fatalf("a body of %d bytes", len(body))
		}
		// A pipe, unlike a socket, refuses deadlines once its other end is closed.
		if err != nil && !errors.Is(err, dek.ErrInvalid) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
			t.Fatalf("class of %v", err)
		}
	})
}

// rawFrame builds a frame with any header.
func rawFrame(length uint32, op byte, seq uint32, body []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, length)
	b = append(b, op)
	b = binary.BigEndian.AppendUint32(b, seq)
	return append(b, body...)
}

func goodFrame(op byte, body ...byte) []byte { return rawFrame(uint32(5+len(body)), op, 9, body) }

// A badFrames row is what a peer sends, and how many replies it gets before
// the one error.
type badFrames struct {
	name    string
	send    []byte
	replies int
}

// malformed edits and joins the golden frames to what no peer may send.
func malformed(golden map[string][]byte) []badFrames {
	hello := golden["hello-cold"]
	edit := func(f func(b []byte)) []byte {
		b := bytes.Clone(hello)
		f(b)
		return b
	}
	after := func(b []byte) []byte { return append(bytes.Clone(hello), b...) }
	return []badFrames{
		{"length 0", rawFrame(0, 0, 0, nil), 0},
		{"length 4", rawFrame(4, 1, 0, nil), 0},
		{"length 65537", rawFrame(65537, 1, 0, nil), 0},
		{"length 4 GiB", rawFrame(1<<32-1, 1, 0, nil), 0},
		{"HTTP", []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), 0},
		{"truncated header", hello[:6], 0},
		{"truncated body", hello[:len(hello)-1], 0},
		{"GET first", golden["get"], 0},
		{"wrong magic", edit(func(b []byte) { b[9] ^= 1 }), 0},
		{"protocol 2", edit(func(b []byte) { b[14] = 2 }), 0},
		{"cold 2", edit(func(b []byte) { b[len(b)-1] = 2 }), 0},
		{"kind with a capital", edit(func(b []byte) { b[17] = 'M' }), 0},
		{"kind longer than the body", edit(func(b []byte) { b[15] = 0xff }), 0},
		{"HELLO with a tail", rawFrame(uint32(len(hello)-3), 1, 1, append(bytes.Clone(hello[9:]), 0)), 0},
		{"HELLO without a body", goodFrame(1), 0},
		{"second HELLO", after(hello), 1},
		{"op 0", after(goodFrame(0)), 1},
		{"op 6", after(goodFrame(6)), 1},
		{"a reply's op", after(golden["get-reply"]), 1},
		{"an error's op", after(golden["error"]), 1},
		{"LIST with a body", after(goodFrame(2, 0)), 1},
		{"GET too short", after(goodFrame(3, 0, 0, 0, 1, 0, 0, 0)), 1},
		{"GET too long", after(goodFrame(3, 0, 0, 0, 1, 0, 0, 0, 1, 0)), 1},
		{"WAIT too short", after(goodFrame(4, 0)), 1},
		{"REPORT count over body", after(goodFrame(5, 0xff, 0xff)), 1},
		{"REPORT of a time beyond time", after(goodFrame(5, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0xff, 0, 0, 0, 0, 0, 0, 0)), 1},
		{"good, then nonsense", after(append(bytes.Clone(golden["get"]), 0, 0, 0, 1)), 2},
	}
}

// Malformed frames on a real socket: one clear error, then the end.
func TestAgentMalformedFrames(t *testing.T) {
	_, h := newShop(t)
	h.start()
	for _, tc := range malformed(readGolden(t)) {
		t.Run(tc.name, func(t *testing.T) {
			c := must(net.Dial("unix", h.cfg.Socket)).(*net.UnixConn)
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := c.Write(tc.send); err != nil {
				t.Fatal(err)
			}
			_ = c.CloseWrite()
			all := must(io.ReadAll(c)) // ends: the agent closed
			for range tc.replies {
				if len(all) < 9 || all[4] == 0xff {
					t.Fatalf("not a reply: %x", all)
				}
				all = all[4+binary.BigEndian.Uint32(all):]
			}
			if len(all) < 11 || all[4] != 0xff || binary.BigEndian.Uint16(all[9:]) != 1 || int(binary.BigEndian.Uint32(all))+4 != len(all) {
				t.Fatalf("no single ERROR invalid: %x", all)
			}
		})
	}
	h.mustDial(connector.NewProcess("mariadb", "shop")) // unharmed
}

func TestNewerCheckpoint(t *testing.T) {
	at := func(n string) []byte { return []byte("log\n" + n + "\nhash\n") }
	for _, tc := range []struct {
		a, b []byte
		want bool
	}{
		{nil, at("1"), true}, {at("1"), at("2"), true}, {at("2"), at("1"), false}, {at("9"), at("10"), true},
		{at("2"), at("2"), false}, {at("2"), nil, false}, {at("2"), []byte("nonsense"), false}, {at("2"), at("x"), false},
	} {
		if got := connector.NewerCheckpoint(tc.a, tc.b); got != tc.want {
			t.Errorf("%q, %q: got %v", tc.a, tc.b, got)
		}
	}
}

// A frame that does not end is cut off, and so is a stranger who says nothing.
func TestAgentSlowFrame(t *testing.T) {
	if testing.Short() {
		t.Skip("takes the agent's own 5 s")
	}
	_, h := newShop(t)
	h.start()
	c := must(net.Dial("unix", h.cfg.Socket))
	defer c.Close()
	hello := readGolden(t)["hello-cold"]
	if _, err := c.Write(append(bytes.Clone(hello), 0, 0)); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	start := time.Now()
	all := must(io.ReadAll(c))
	if d := time.Since(start); d < 3*time.Second || d > 15*time.Second || !bytes.Contains(all, []byte("not finished in time")) {
		t.Errorf("after %v: %q", d, all)
	}
}
