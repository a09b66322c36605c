package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// manyChanges is how often the state is changed before a start is measured
// again.
const manyChanges = 100_000

func startSoftware(ctx context.Context, b *bench) ([]Result, error) {
	return b.starts(ctx, startKind{name: "kms/start", limit: 500})
}

func startSoftHSM(ctx context.Context, b *bench) ([]Result, error) {
	return b.starts(ctx, startKind{name: "kms/start/softhsm", limit: 1500, hsm: true})
}

// A startKind is one row of starts.
type startKind struct {
	name  string
	limit float64 // ms
	hsm   bool
}

// starts measures from exec to the first unwrap, on a small state and after
// very many changes.
func (b *bench) starts(ctx context.Context, kind startKind) (results []Result, err error) {
	s, err := b.newService(ctx, kind.hsm)
	if err != nil {
		return nil, err
	}
	running := true
	defer func() {
		if running {
			err = errors.Join(err, s.stop())
		}
	}()
	w, err := s.oneWrap(ctx)
	if err != nil {
		return nil, err
	}
	measure := func(name string) error {
		running = false
		r, err := b.timeStarts(ctx, s, w, kind, name)
		results = append(results, r...)
		running = err == nil
		return err
	}
	if err := measure(kind.name); err != nil {
		return nil, err
	}
	changes := b.pick(manyChanges, 200)
	took := time.Now()
	if err := s.change(ctx, changes); err != nil {
		return nil, err
	}
	fmt.Fprintf(b.out, "%d changes of state in %.0f s\n", changes, time.Since(took).Seconds())
	return results, measure(kind.name + "/after_100k")
}

// timeStarts stops and starts the service again and again. It is up when
// there is no error.
func (b *bench) timeStarts(ctx context.Context, s *service, w dek.Wrapped, kind startKind, name string) ([]Result, error) {
	var ms, mb []float64
	for range b.rounds {
		if err := s.stop(); err != nil {
			return nil, err
		}
		begin := time.Now()
		if err := s.start(ctx); err != nil {
			return nil, err
		}
		if err := s.firstUnwrap(ctx, w); err != nil {
			return nil, errors.Join(err, s.stop())
		}
		ms = append(ms, float64(time.Since(begin).Microseconds())/1000)
		m, err := memory(s.proc.pid(), "VmRSS")
		if err != nil {
			return nil, err
		}
		mb = append(mb, m)
	}
	return []Result{
		limit(name, "ms from exec to the first unwrap", ms, kind.limit),
		limit(name+"/rss", "MB, keyward-kms after it", mb, 80),
	}, nil
}

// oneWrap prepares a host with one keyring.
func (s *service) oneWrap(ctx context.Context) (dek.Wrapped, error) {
	if err := s.prepareHost(ctx, 1); err != nil {
		return dek.Wrapped{}, err
	}
	c, err := s.connect(s.host)
	if err != nil {
		return dek.Wrapped{}, err
	}
	ws, err := s.wraps(ctx, c)
	if err != nil {
		return dek.Wrapped{}, err
	}
	return ws[0], nil
}

// firstUnwrap connects anew and unwraps one DEK.
func (s *service) firstUnwrap(ctx context.Context, w dek.Wrapped) error {
	c, err := s.connect(s.host)
	if err != nil {
		return err
	}
	k, err := c.Unwrap(ctx, w)
	k.Destroy()
	return err
}

// change changes the state n times: a keyring's only version is switched off
// and on again, by many callers at once, each on a keyring of its own.
func (s *service) change(ctx context.Context, n int) error {
	const callers = manyCallers
	if err := s.connectAdmin(); err != nil {
		return err
	}
	err := each(ctx, callers, func(ctx context.Context, i int) error {
		_, err := s.admin.CreateKeyring(ctx, connector.NewKeyring{Vault: benchVault, Name: fmt.Sprintf("change-%d", i), MasterKey: benchMaster})
		return err
	})
	if err != nil {
		return err
	}
	before, err := s.admin.Status(ctx)
	if err != nil {
		return err
	}
	err = each(ctx, callers, func(ctx context.Context, i int) error {
		for j := i; j < n; j += callers {
			sw := connector.Switch{Vault: benchVault, Name: fmt.Sprintf("change-%d", i), Enabled: (j/callers)%2 == 1}
			if _, err := s.admin.SetKeyringEnabled(ctx, sw); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	after, err := s.admin.Status(ctx)
	if err == nil && after.Changes < before.Changes+uint64(n) { //nolint:gosec // a positive count
		err = fmt.Errorf("the service counts %d changes, want %d", after.Changes-before.Changes, n)
	}
	return err
}
