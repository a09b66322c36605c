package kms

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// The severities of a Problem.
const (
	red    = "red"    // data would be lost, or is not served
	yellow = "yellow" // someone should look
)

// clockJump is how far wall time may leave the monotonic clock between rounds.
const clockJump = 5 * time.Minute

// Status says how the service is and what someone must mend. It wraps
// dek.ErrDenied. A stopped service still answers its administrators.
func (s *Service) Status(ctx context.Context, c Caller) (Status, error) {
	var out Status
	if err := s.ready(); err != nil {
		if !s.allowed(c, OpStatus, "/") {
			return out, dek.ErrDenied
		}
		out = s.status()
		return out, nil
	}
	err := s.do(ctx, c, OpStatus, "/", nil, func(*act) error {
		out = s.status()
		return nil
	})
	if err != nil {
		return Status{}, err
	}
	return out, nil
}

func (s *Service) status() Status {
	v, w := s.view.Load(), s.watchdog.read()
	out := Status{
		Token: s.cfg.Token.Describe(), TokenHealthy: w.health == nil, OAEPHash: s.cfg.Token.OAEPHash().String(),
		Recovery: describeRecipient(v.system.Recipient), LastBackup: s.saver.last(v.system.LastBackup),
		Changes: v.change, AuditSize: s.logged.Load(), Quarantined: w.quarantined,
	}
	if s.cfg.Backups != nil {
		out.BackupTarget = fmt.Sprint(s.cfg.Backups)
	}
	for _, e := range sorted(&v.instances, "") {
		if e.value.Revoked.IsZero() {
			out.Instances = append(out.Instances, s.instanceModel(v, e.key))
		}
	}
	out.Problems = slices.Concat(s.safetyProblems(v, w), v.stateProblems(s.now()), w.problems())
	if s.cfg.Problems != nil {
		out.Problems = append(out.Problems, s.cfg.Problems()...)
	}
	slices.SortStableFunc(out.Problems, func(a, b Problem) int { return strings.Compare(a.Severity, b.Severity) }) // red < yellow
	return out
}

// safetyProblems are about what would be lost.
func (s *Service) safetyProblems(v *view, w watchdogState) []Problem {
	var out []Problem
	if err := s.ready(); err != nil {
		out = append(out, Problem{red, "the service has stopped serving: " + err.Error(), "follow the text; nothing was changed"})
	}
	lost := fmt.Sprintf("all %d keyring versions", v.countVersions())
	if v.system.Recipient == "" {
		out = append(out, Problem{red, "no recovery recipient: if the token is lost, " + lost + " and all data under them are lost",
			"make a recipient with keyward recovery generate and set the service up with it"})
	}
	if s.cfg.Backups == nil {
		out = append(out, Problem{red, "no backup target: if the disk of this host is lost, " + lost + " and all data under them are lost",
			"configure a backup target on another disk or host"})
	}
	if w.health != nil {
		out = append(out, Problem{red, "the token does not work: " + w.health.Error(), "attach the token " + s.cfg.Token.Describe() + "; databases that run keep running, none can start"})
	}
	if err := s.saver.failure(); err != nil {
		out = append(out, Problem{red, "the backup target does not take backups: " + err.Error(), "mend the target; until then no key or keyring can be made or rolled"})
	}
	if s.cfg.Token.OAEPHash().String() == "SHA-1" {
		out = append(out, Problem{yellow, "the token does OAEP with SHA-1 only", "use a token with SHA-256 OAEP for production"})
	}
	if s.restsOnRSA(v) {
		out = append(out, Problem{yellow, "the token has no AES, its root is an RSA key: what is said of attackers with a quantum computer does not hold here, a backup is as safe as RSA is",
			"set up a token with AES and restore a backup to it with the recovery shares"})
	}
	return out
}

// restsOnRSA reports whether a seal key stands under an RSA root.
func (s *Service) restsOnRSA(v *view) bool {
	under := func(sv sealVersion) bool { return s.cfg.Token.RestsOnRSA(sv.Sealed) }
	if slices.ContainsFunc(v.boot.Seals, under) {
		return true
	}
	for _, rec := range v.vaults.all() {
		if slices.ContainsFunc(rec.Seals, under) {
			return true
		}
	}
	return false
}

func (v *view) countVersions() int {
	n := 0
	for _, r := range v.rings.all() {
		n += len(r.versions)
	}
	return n
}

// stateProblems are about what people did and forgot.
func (v *view) stateProblems(now time.Time) []Problem {
	var out []Problem
	for _, e := range sorted(&v.keys, "") {
		for i, r := range e.value.versions {
			out = append(out, versionProblem("key", e.key, dek.Version(i+1), r.State, now.Sub(r.Created))...)
		}
	}
	for _, e := range sorted(&v.rings, "") {
		for i, r := range e.value.versions {
			out = append(out, versionProblem("keyring", e.key, dek.Version(i+1), r.State, now.Sub(r.Created))...)
		}
	}
	for _, e := range sorted(&v.tokens, "") {
		if t := e.value; !t.Reused.IsZero() {
			out = append(out, Problem{red, fmt.Sprintf("the enrolment token of %s was presented twice (%s)", t.Principal, t.Reused.Format(time.RFC3339)),
				"find out who holds it; if in doubt revoke the identity and prepare another one"})
		}
	}
	return out
}

func versionProblem(kind, id string, n dek.Version, state State, age time.Duration) []Problem {
	switch {
	case state == Disabled:
		return []Problem{{yellow, fmt.Sprintf("%s %s version %d is disabled", kind, id, n),
			"enable it, or leave it: databases that need it can't start"}}
	case state == Pending && age > 2*pendingAge:
		return []Problem{{yellow, fmt.Sprintf("%s %s version %d is pending for %s", kind, id, n, age.Round(time.Second)),
			"it is finished or given up as soon as token, store and backup target work"}}
	}
	return nil
}
