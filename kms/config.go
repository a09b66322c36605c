package kms

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/keyward/keyward/dek"
)

// A Config is what the rules need of the world. Everything in it is used
// concurrently and must outlive the Service; the caller closes it afterwards.
type Config struct {
	Token      Token
	Store      Store
	Clock      Clock
	Authorizer Authorizer

	// Auditor keeps the log; it implements AuditTail too. If it is nil,
	// OpenAudit must be set.
	Auditor Auditor
	// OpenAudit opens the log once the audit key in the token is known, which
	// signs its checkpoints. Init, Open and Restore call it at most once each. An
	// Auditor opened this way that has a Close method is closed by
	// Service.Close (and at the end of Init and Restore).
	OpenAudit func(ctx context.Context, signer crypto.Signer) (Auditor, error)

	// Strict separates duties: one principal can't hold conflicting roles.
	Strict bool
	// Backups gets a sealed backup before a new version is enabled, named by
	// the day. nil: none, and Status is red.
	Backups BackupTarget
	// Problems adds to Status what the rules can't see (certificates that end,
	// say). nil: nothing.
	Problems func() []Problem
	// Logger gets what operators should see. nil: discarded.
	Logger *slog.Logger

	limits limits // zero: the defaults; tests lower them
}

// limits are figures that tests make small.
type limits struct {
	seals   uint64        // messages under one seal key before it is rolled
	block   uint64        // seals reserved ahead in one write
	pending time.Duration // age at which the reconciler takes a PENDING version over
	tick    time.Duration // between rounds of the reconciler
	ping    time.Duration // between pings of a Watch
}

// The defaults of limits.
const (
	// maxSeals is half of what NIST SP 800-38D §8.3 allows for random nonces:
	// the other half covers attempts of which the store never heard.
	maxSeals      = 1 << 31
	sealBlock     = 1 << 12
	pendingAge    = 60 * time.Second
	reconcileTick = 15 * time.Second
	pingInterval  = 5 * time.Second
)

// complete checks c and fills the defaults in; all mistakes come at once.
func (c Config) complete() (Config, error) {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%w: config: %s is missing", dek.ErrInvalid, what))
		}
	}
	need(c.Token != nil, "Token")
	need(c.Store != nil, "Store")
	need(c.Clock != nil, "Clock")
	need(c.Authorizer != nil, "Authorizer")
	need(c.Auditor != nil || c.OpenAudit != nil, "Auditor or OpenAudit")
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	l := &c.limits
	l.seals = or(l.seals, maxSeals)
	l.block = or(l.block, sealBlock)
	l.pending = or(l.pending, pendingAge)
	l.tick = or(l.tick, reconcileTick)
	l.ping = or(l.ping, pingInterval)
	return c, errors.Join(errs...)
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}
