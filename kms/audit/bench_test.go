package audit_test

import (
	"context"
	"crypto"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

func benchConfig(b *testing.B) audit.Config {
	return audit.Config{Dir: newDir(b), Signer: testKey(), Logger: slog.New(slog.DiscardHandler)}
}

// BenchmarkAppend shows durable records a second by number of callers.
func BenchmarkAppend(b *testing.B) {
	for _, callers := range []int{1, 8, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			l := open(b, benchConfig(b))
			defer closeLog(b, l)
			var n atomic.Int64
			b.SetParallelism((callers + 1) / 2) // times GOMAXPROCS, 2 here
			if callers == 1 {
				for i := 0; b.Loop(); i++ {
					mustAppend(b, l, event(i, kms.PhaseRefused))
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
				return
			}
			b.ResetTimer()
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					if _, err := l.Append(context.Background(), event(int(n.Add(1)), kms.PhaseRefused)); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

// BenchmarkFdatasync is the floor: one 350-byte overwrite of a block, synced.
func BenchmarkFdatasync(b *testing.B) {
	f, err := os.Create(newDir(b))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 1<<20)); err != nil {
		b.Fatal(err)
	}
	line := make([]byte, 350)
	for i := 0; b.Loop(); i++ {
		if _, err := f.WriteAt(line, int64(i*350%(1<<20-350))); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpenAndVerify builds a log of 300,000 records and shows how long it
// takes to open and to verify it.
func BenchmarkOpenAndVerify(b *testing.B) {
	const records = 300_000
	cfg := benchConfig(b)
	l := open(b, cfg)
	done := make(chan error)
	for range 64 {
		go func() {
			var err error
			for i := 0; i < records/64 && err == nil; i++ {
				_, err = l.Append(context.Background(), event(i, kms.PhaseRefused))
			}
			done <- err
		}()
	}
	for range 64 {
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	}
	closeLog(b, l)
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			closeLog(b, open(b, cfg))
		}
	})
	b.Run("verify", func(b *testing.B) {
		start := time.Now()
		var n uint64
		for b.Loop() {
			r, err := audit.Verify(b.Context(), os.DirFS(cfg.Dir), audit.Check{Keys: []crypto.PublicKey{testKey().Public()}})
			if err != nil {
				b.Fatal(err)
			}
			n += r.Last
		}
		b.ReportMetric(float64(n)/time.Since(start).Seconds(), "records/s")
	})
}

// BenchmarkActs shows the CPU of an intent and its outcome with 64 callers who
// wait for one token of 3,000 operations a second in between.
func BenchmarkActs(b *testing.B) {
	l := open(b, benchConfig(b))
	defer closeLog(b, l)
	token := make(chan chan struct{})
	defer close(token)
	for range 2 {
		go func() {
			for done := range token {
				time.Sleep(600 * time.Microsecond)
				close(done)
			}
		}()
	}
	before := cpuTime(b)
	b.SetParallelism(32) // times GOMAXPROCS, 2 here
	b.RunParallel(func(p *testing.PB) {
		for i := 0; p.Next(); i++ {
			e := event(i, kms.PhaseIntent)
			seq := mustAppend(b, l, e)
			done := make(chan struct{})
			token <- done
			<-done
			e.Phase, e.Intent = kms.PhaseOutcome, seq
			mustAppend(b, l, e)
		}
	})
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N), "cpu-us/act")
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
