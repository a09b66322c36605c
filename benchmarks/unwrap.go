package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

const (
	unwrapSpan = 3 * time.Second
	// batchItems is the size of one batched call; batchCallers keep the token
	// busy while a reply is under way.
	batchItems   = 500
	batchCallers = 2
	// sameBursts is how often 64 clients ask at once for one DEK.
	sameBursts = 50
)

// An unwrapRig is a service on SoftHSM with as many distinct wrapped DEKs as
// there are callers: what is asked twice at the same time would be done once.
type unwrapRig struct {
	*service
	b       *bench
	client  *connector.Client
	callers []dek.Wrapped   // one per caller
	batches [][]dek.Wrapped // one per batch caller
}

// unwraps measures cold unwraps over gRPC with mutual TLS and durable audit
// against C_Decrypt on the same token, and the service's memory meanwhile.
func unwraps(ctx context.Context, b *bench) (results []Result, err error) {
	s, err := b.newService(ctx, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	r := &unwrapRig{service: s, b: b}
	if err := r.fill(ctx); err != nil {
		return nil, err
	}
	rss, err := s.watchMemory(ctx, func() error {
		results, err = r.measure(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	same, err := r.same(ctx)
	return append(append(results, same), rss...), err
}

// fill makes the wrapped DEKs.
func (r *unwrapRig) fill(ctx context.Context) (err error) {
	if err := r.prepareHost(ctx, manyCallers); err != nil {
		return err
	}
	items := r.b.pick(batchItems, manyCallers)
	if err := r.roll(ctx, manyCallers, batchCallers*items); err != nil {
		return err
	}
	if r.client, err = r.connect(r.host); err != nil {
		return err
	}
	ws, err := r.wraps(ctx, r.client)
	if err != nil {
		return err
	}
	if len(ws) < max(manyCallers, batchCallers*items) {
		return fmt.Errorf("only %d wrapped DEKs", len(ws))
	}
	r.callers = ws[:manyCallers]
	for i := range batchCallers {
		r.batches = append(r.batches, ws[i*items:(i+1)*items])
	}
	return nil
}

func (r *unwrapRig) measure(ctx context.Context) ([]Result, error) {
	got, err := r.b.interleave(ctx, r.raw, r.single, r.batched)
	if err != nil {
		return nil, err
	}
	const ops, cpu, client, service, child = 0, 1, 2, 3, 4
	raw, single, batched := got[0], got[1], got[2]
	const against = "C_Decrypt, RSA-2048 OAEP, same token"
	rates := question{name: "unwrap/grpc/64", against: against, unit: "unwraps/s", goal: ">= 0.90"}
	batches := question{name: "unwrap/batch", against: against, unit: "unwraps/s", goal: ">= 0.96"}
	cost := func(name string, ours []float64) Result {
		return question{name: name, against: against, unit: "us CPU/unwrap", lessIsBetter: true}.compare(ours, raw[cpu])
	}
	return []Result{
		rates.compare(single[ops], raw[ops]),
		cost("unwrap/grpc/64/cpu", single[cpu]),
		cost("unwrap/grpc/64/cpu/client", single[client]),
		cost("unwrap/grpc/64/cpu/service", single[service]),
		cost("unwrap/grpc/64/cpu/token_child", single[child]),
		batches.compare(batched[ops], raw[ops]),
		cost("unwrap/batch/cpu", batched[cpu]),
		cost("unwrap/batch/cpu/token_child", batched[child]),
	}, nil
}

// raw is the limit, in a process of its own: operations a second, CPU us each.
func (r *unwrapRig) raw(ctx context.Context) (sample, error) {
	cmd := helper(ctx, "helper-raw-decrypt", softHSMModule, r.path("pin"), strconv.FormatInt(r.b.span(unwrapSpan).Milliseconds(), 10))
	cmd.Env = append(cmd.Environ(), r.env...)
	var words strings.Builder
	cmd.Stderr = &words
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("raw decrypt: %w: %s", err, words.String())
	}
	s := make(sample, 2)
	_, err = fmt.Sscan(string(out), &s[0], &s[1])
	return s, err
}

func (r *unwrapRig) single(ctx context.Context) (sample, error) {
	return r.perUnwrap(ctx, manyCallers, 1, func(ctx context.Context, caller, _ int) error {
		k, err := r.client.Unwrap(ctx, r.callers[caller])
		k.Destroy()
		return err
	})
}

func (r *unwrapRig) batched(ctx context.Context) (sample, error) {
	return r.perUnwrap(ctx, batchCallers, len(r.batches[0]), func(ctx context.Context, caller, _ int) error {
		rs, err := r.client.UnwrapBatch(ctx, r.batches[caller])
		for _, item := range rs {
			err = errors.Join(err, item.Err)
			item.Key.Destroy()
		}
		return err
	})
}

// perUnwrap drives f, which does items unwraps, and adds what one costs: all
// CPU in us, and the shares of client, service and token child.
func (r *unwrapRig) perUnwrap(ctx context.Context, callers, items int, f func(ctx context.Context, caller, call int) error) (sample, error) {
	pids, err := r.pids()
	if err != nil {
		return nil, err
	}
	before, err := cpuTimes(pids)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	calls, err := rate(ctx, callers, r.b.span(unwrapSpan), f)
	if err != nil {
		return nil, err
	}
	unwraps := calls * time.Since(start).Seconds() * float64(items)
	after, err := cpuTimes(pids)
	if err != nil || len(after) != 3 {
		return nil, errors.Join(err, fmt.Errorf("%d processes, want client, service and child", len(after)))
	}
	s := sample{calls * float64(items), 0}
	for i := range after {
		us := (after[i] - before[i]) / unwraps
		s = append(s, us)
		s[1] += us
	}
	return s, nil
}

// same has 64 clients ask at once for one DEK that nobody holds, again and
// again, and counts what the token did for each burst.
func (r *unwrapRig) same(ctx context.Context) (Result, error) {
	clients, err := r.manyClients(ctx)
	if err != nil {
		return Result{}, err
	}
	var operations, one []float64
	for i := range r.b.pick(sameBursts, 5) {
		s, err := r.admin.Status(ctx)
		if err != nil {
			return Result{}, err
		}
		if err := burst(ctx, clients, r.callers[i%len(r.callers)]); err != nil {
			return Result{}, err
		}
		n, err := r.tokenOperations(ctx, s.AuditSize)
		if err != nil {
			return Result{}, err
		}
		operations, one = append(operations, n), append(one, 1)
	}
	q := question{name: "unwrap/same", against: "one", unit: "token operations for 64 clients' unwraps of one DEK", goal: "= 1", lessIsBetter: true}
	return q.compare(operations, one), nil
}

// manyClients are connected clients. One client alone would collapse what is
// asked of it itself.
func (r *unwrapRig) manyClients(ctx context.Context) ([]*connector.Client, error) {
	var clients []*connector.Client
	for range manyCallers {
		c, err := r.connect(r.host)
		if err != nil {
			return clients, err
		}
		clients = append(clients, c)
		k, err := c.Unwrap(ctx, r.callers[0])
		if err != nil {
			return clients, err
		}
		k.Destroy()
	}
	return clients, nil
}

// burst lets all clients go at the same instant.
func burst(ctx context.Context, clients []*connector.Client, w dek.Wrapped) error {
	ready, errs := make(chan struct{}), make([]error, len(clients))
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() {
			<-ready
			k, err := c.Unwrap(ctx, w)
			k.Destroy()
			errs[i] = err
		})
	}
	close(ready)
	wg.Wait()
	return errors.Join(errs...)
}

// tokenOperations counts, in the audit log from a record on, the unwraps that
// went to the token: all intents but those that say that they took part in
// another's operation.
func (r *unwrapRig) tokenOperations(ctx context.Context, from uint64) (float64, error) {
	intents, collapsed := 0, 0
	f := connector.AuditFilter{Operation: "keyring.unwrap", FromSequence: from, Limit: 4 * manyCallers}
	err := r.admin.ReadAudit(ctx, f, func(rec connector.AuditRecord) error {
		var line struct{ Phase, Note string }
		if err := json.Unmarshal(rec.Line, &line); err != nil {
			return err
		}
		if line.Phase == "intent" {
			intents++
			if line.Note == "collapsed" {
				collapsed++
			}
		}
		return nil
	})
	if err == nil && intents != manyCallers {
		err = fmt.Errorf("the audit log has %d intents for %d unwraps", intents, manyCallers)
	}
	return float64(intents - collapsed), err
}

// watchMemory runs f and returns the most memory that the service and its
// token child had meanwhile, in MB.
func (s *service) watchMemory(ctx context.Context, f func() error) ([]Result, error) {
	pids, err := s.pids()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	most := make([]float64, 2) // service, child
	var werr error
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for werr == nil {
			werr = sampleMemory(pids, most)
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	err = f()
	cancel()
	wg.Wait()
	if err := errors.Join(err, werr); err != nil {
		return nil, err
	}
	return []Result{
		limit("kms/rss", "MB, keyward-kms under load", most[:1], 80),
		limit("kms/rss/token_child", "MB, its child with the PKCS#11 module", most[1:], 80),
		limit("kms/rss/both", "MB, the two together", []float64{most[0] + most[1]}, 80),
	}, nil
}

func sampleMemory(pids []int, most []float64) error {
	for i, pid := range pids[:min(len(pids), len(most))] {
		mb, err := memory(pid, "VmRSS")
		if err != nil {
			return err
		}
		most[i] = max(most[i], mb)
	}
	return nil
}
