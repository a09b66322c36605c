package connector_test

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
)

const (
	benchCallers = 8
	getSize      = 17 // GET request frame
	replySize    = 50 // GET reply frame
)

// echoServer is the yardstick: frames of the same sizes, nothing looked up.
func echoServer(b *testing.B) string {
	path := filepath.Join(b.TempDir(), "echo.sock")
	l := must(net.Listen("unix", path))
	b.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				in, out := make([]byte, 4096), make([]byte, replySize)
				binary.BigEndian.PutUint32(out, replySize-4)
				have := 0
				for {
					n, err := c.Read(in[have:])
					if err != nil {
						return
					}
					for have += n; have >= getSize; have = copy(in, in[getSize:have]) {
						if _, err := c.Write(out); err != nil {
							return
						}
					}
				}
			}()
		}
	}()
	return path
}

// rate sends n requests over each connection and returns requests per second.
func rate(b *testing.B, conns []net.Conn, request []byte, n int) float64 {
	var wg sync.WaitGroup
	start := time.Now()
	for _, c := range conns {
		wg.Go(func() {
			reply := make([]byte, replySize)
			for range n {
				if _, err := c.Write(request); err != nil {
					b.Error(err)
					return
				}
				if _, err := io.ReadFull(c, reply); err != nil || reply[3] != replySize-4 {
					b.Errorf("reply %x: %v", reply, err)
					return
				}
			}
		})
	}
	wg.Wait()
	return float64(n*len(conns)) / time.Since(start).Seconds()
}

// BenchmarkSocketGet measures socket/get beside a bare echo, round by round,
// both served by this process, 8 callers. The median ratio is what counts.
func BenchmarkSocketGet(b *testing.B) {
	kms := newFakeKMS(b, newTestCA(b, "ca"))
	kms.addVersion("orders", 1)
	h := newHost(b, kms)
	h.start()
	h.mustDial(connector.NewProcess("mariadb", "shop"))
	echo := echoServer(b)
	frames := connector.GoldenFrames()
	request := frames["get"]
	binary.BigEndian.PutUint32(request[13:], 1) // version 1
	var ours, theirs []net.Conn
	for range benchCallers {
		c := must(net.Dial("unix", h.cfg.Socket))
		if _, err := c.Write(frames["hello-cold"]); err != nil {
			b.Fatal(err)
		}
		size := make([]byte, 4)
		if _, err := io.ReadFull(c, size); err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(size))); err != nil {
			b.Fatal(err)
		}
		ours, theirs = append(ours, c), append(theirs, must(net.Dial("unix", echo)))
	}
	defer func() {
		for _, c := range append(ours, theirs...) {
			_ = c.Close()
		}
	}()
	const perRound = 2000
	rate(b, ours, request, perRound) // warm
	rate(b, theirs, request, perRound)
	var a, e, ratios []float64
	b.ReportAllocs()
	for b.Loop() {
		x, y := rate(b, ours, request, perRound), rate(b, theirs, request, perRound)
		a, e, ratios = append(a, x), append(e, y), append(ratios, x/y)
	}
	median := func(v []float64) float64 { slices.Sort(v); return v[len(v)/2] }
	b.ReportMetric(median(a), "gets/s")
	b.ReportMetric(median(e), "echoes/s")
	b.ReportMetric(median(ratios), "ratio")
}
