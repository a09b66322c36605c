package kms

import (
	"time"

	"github.com/keyward/keyward/dek"
)

// WithLimits returns c with small figures; zero keeps a default.
func (c Config) WithLimits(seals, block uint64, pending, tick, ping time.Duration) Config {
	c.limits = limits{seals: seals, block: block, pending: pending, tick: tick, ping: ping}
	return c
}

// GateWaits reports whether a change waits for keys on their way out.
func (s *Service) GateWaits() bool {
	if s.gate.TryRLock() {
		s.gate.RUnlock()
		return false
	}
	return true
}

// KeyState is the state of a master key version as the view has it, 0 if it is
// not there.
func (s *Service) KeyState(vault, name string, n dek.Version) State {
	if k := s.view.Load().key(vault, name); k != nil {
		if r := k.version(n); r != nil {
			return r.State
		}
	}
	return 0
}

// RingState is the same for a keyring version, and whether its recovery copy is
// stored.
func (s *Service) RingState(vault, name string, n dek.Version) (State, bool) {
	if k := s.view.Load().ring(vault, name); k != nil {
		if r := k.version(n); r != nil {
			return r.State, len(r.Recovery) > 0
		}
	}
	return 0, false
}
