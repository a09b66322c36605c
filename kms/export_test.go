package kms

import "time"

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
