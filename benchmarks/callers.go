package main

import (
	"context"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// manyCallers is how many ask at once in the benchmarks of concurrent callers.
const manyCallers = 64

// each runs f for 0..n-1 with many callers.
func each(ctx context.Context, n int, f func(context.Context, int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(manyCallers)
	for i := range n {
		g.Go(func() error { return f(ctx, i) })
	}
	return g.Wait()
}

// rate has callers call f over and over for a time and returns how often per
// second f returned. f gets the caller's number and its count of calls.
func rate(ctx context.Context, callers int, d time.Duration, f func(ctx context.Context, caller, call int) error) (float64, error) {
	var done atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for caller := range callers {
		g.Go(func() error {
			for call := 0; time.Since(start) < d; call++ {
				if err := f(ctx, caller, call); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}
	err := g.Wait()
	return float64(done.Load()) / time.Since(start).Seconds(), err
}

// ownCPU is the CPU this process has used.
func ownCPU() (time.Duration, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0, err
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}

// cpuTimes are those of this process and some others, in us.
func cpuTimes(pids []int) ([]float64, error) {
	own, err := ownCPU()
	if err != nil {
		return nil, err
	}
	us := []float64{float64(own.Microseconds())}
	for _, pid := range pids {
		t, err := cpuTime(pid)
		if err != nil {
			return nil, err
		}
		us = append(us, float64(t.Microseconds()))
	}
	return us, nil
}
