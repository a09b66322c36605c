package kms_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

func redeem(h *house, text kms.TokenText, remote string) (string, error) {
	got := ""
	err := h.s.Redeem(h.t.Context(), kms.Caller{Remote: remote}, text, func(p string) error {
		got = p
		return nil
	})
	return got, err
}

func TestRedeem(t *testing.T) {
	h := newHouse(t, "")
	if p, err := redeem(h, h.first.Text, "10.0.0.1:1"); p != admin.Principal || err != nil {
		t.Fatalf("first administrator: %q, %v", p, err)
	}
	h.furnish()
	ctx := t.Context()
	// Again: refused, recorded, alarm.
	if p, err := redeem(h, h.first.Text, "10.6.6.6:1"); p != "" || !errors.Is(err, dek.ErrDenied) {
		t.Errorf("second use: %q, %v", p, err)
	}
	st := must(h.s.Status(ctx, admin))
	if !strings.Contains(fmt.Sprint(st.Problems), "presented twice") {
		t.Errorf("no alarm: %v", st.Problems)
	}
	// Expired.
	tok, err := h.s.NewEnrolmentToken(ctx, admin, "person/eve", time.Minute)
	check(t, err)
	h.clock.jump(2 * time.Minute)
	if _, err := redeem(h, tok.Text, "10.0.0.9:1"); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("expired: %v", err)
	}
	// Replaced by a newer one.
	a, err := h.s.NewEnrolmentToken(ctx, admin, "person/fay", 0)
	check(t, err)
	b, err := h.s.NewEnrolmentToken(ctx, admin, "person/fay", 0)
	check(t, err)
	if _, err := redeem(h, a.Text, "10.0.0.9:1"); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("replaced: %v", err)
	}
	if p, err := redeem(h, b.Text, "10.0.0.9:1"); p != "person/fay" || err != nil {
		t.Errorf("newer: %q, %v", p, err)
	}
	// Spent although issuing failed.
	c, err := h.s.NewEnrolmentToken(ctx, admin, "person/gil", 0)
	check(t, err)
	err = h.s.Redeem(ctx, kms.Caller{Remote: "10.0.0.7:1"}, c.Text, func(string) error { return dek.ErrUnavailable })
	if !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("failed issue: %v", err)
	}
	if _, err := redeem(h, c.Text, "10.0.0.7:1"); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("token after a failed issue: %v", err)
	}
}

// TestRedeemOnce: of many at once one gets in.
func TestRedeemOnce(t *testing.T) {
	h := newHouse(t, "")
	var in atomic.Int64
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if _, err := redeem(h, h.first.Text, fmt.Sprintf("10.0.0.%d:1", i)); err == nil {
				in.Add(1)
			}
		})
	}
	wg.Wait()
	if in.Load() != 1 {
		t.Errorf("%d got in, want 1", in.Load())
	}
}

func TestRedeemAttempts(t *testing.T) {
	h := newHouse(t, "")
	for _, bad := range []kms.TokenText{"", "kwt1_", "kwt1_AAAA", kms.TokenText("kwt1_" + strings.Repeat("A", 59)), kms.TokenText("kwt2_" + h.first.Text[5:])} {
		if _, err := redeem(h, bad, "10.9.9.9:1"); !errors.Is(err, dek.ErrDenied) {
			t.Errorf("%q: %v", bad.Reveal(), err)
		}
	}
	for range 5 {
		redeem(h, "kwt1_x", "10.9.9.9:2")
	}
	if _, err := redeem(h, h.first.Text, "10.9.9.9:3"); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("good token after ten bad ones from the same host: %v", err)
	}
	if p, err := redeem(h, h.first.Text, "10.9.9.8:3"); p != admin.Principal || err != nil {
		t.Errorf("from another host: %q, %v", p, err)
	}
}

func TestTokenTextIsSecret(t *testing.T) {
	const secret = "kwt1_secret"
	text := kms.TokenText(secret)
	tok := kms.EnrolmentToken{Principal: "person/x", Text: text}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		for _, v := range []any{text, &text, tok, &tok} {
			if s := fmt.Sprintf(verb, v); strings.Contains(s, "secret") && !strings.Contains(s, "redacted") || strings.Contains(s, fmt.Sprintf("%x", secret)) {
				t.Errorf("%s prints %q", verb, s)
			}
		}
	}
	var out strings.Builder
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "token", text)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "token", text)
	if strings.Contains(out.String(), secret) {
		t.Errorf("logged: %s", out.String())
	}
	if b, err := json.Marshal(tok); err == nil {
		t.Errorf("encoded: %s", b)
	}
	if text.Reveal() != secret {
		t.Error("Reveal gives another text")
	}
}

func TestStrict(t *testing.T) {
	h := newHouse(t, "")
	h.s.Close()
	h.edit = func(c *kms.Config) { c.Strict = true }
	h.open()
	h.furnish()
	ctx := t.Context()
	for _, g := range []kms.Grant{
		{Principal: officer.Principal, Role: "auditor", Scope: "/"},
		{Principal: admin.Principal, Role: "crypto officer", Scope: "/"},
		{Principal: admin.Principal, Role: kms.RoleAdministrator, Scope: "/vaults/v"},
	} {
		if err := h.s.AddGrant(ctx, admin, g); !errors.Is(err, dek.ErrPrecondition) {
			t.Errorf("%v: %v", g, err)
		}
	}
	if err := h.s.AddGrant(ctx, admin, kms.Grant{Principal: "person/x", Role: "king", Scope: "/"}); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("unknown role: %v", err)
	}
	if err := h.s.RemoveGrant(ctx, admin, kms.Grant{Principal: admin.Principal, Role: kms.RoleAdministrator, Scope: "/"}); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("last administrator: %v", err)
	}
	if err := h.s.RevokeIdentity(ctx, admin, admin.Principal); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("revoke the last administrator: %v", err)
	}
}

// TestPrepare: all or nothing, idempotent, and the names that stand against it.
func TestPrepare(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	_, err := h.s.CreateKeyring(ctx, officer, kms.CreateKeyring{Vault: "v", Name: "s", MasterKey: "k", ServerKey: 1})
	check(t, err)
	good := kms.PrepareInstance{RequestID: "p", Kind: "mariadb", Name: "db9", Vault: "v", Keyrings: []string{"r"}}
	cases := []struct {
		name string
		edit func(*kms.PrepareInstance)
		want error
	}{
		{"no keyring", func(p *kms.PrepareInstance) { p.Keyrings = nil }, dek.ErrInvalid},
		{"absent keyring", func(p *kms.PrepareInstance) { p.Keyrings = []string{"x"} }, dek.ErrNotFound},
		{"absent vault", func(p *kms.PrepareInstance) { p.Vault = "x" }, dek.ErrNotFound},
		{"twice", func(p *kms.PrepareInstance) { p.Keyrings = []string{"r", "r"} }, dek.ErrInvalid},
		{"server keys clash", func(p *kms.PrepareInstance) { p.Keyrings = []string{"r", "s"} }, dek.ErrPrecondition},
		{"name taken", func(p *kms.PrepareInstance) { p.Name = "db1" }, dek.ErrExists},
		{"bad name", func(p *kms.PrepareInstance) { p.Name = "../x" }, dek.ErrInvalid},
		{"too long", func(p *kms.PrepareInstance) { p.Lifetime = 1e6 * time.Hour }, dek.ErrInvalid},
	}
	for _, c := range cases {
		req := good
		c.edit(&req)
		if _, _, err := h.s.PrepareInstance(ctx, officer, req); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	_, a, err := h.s.PrepareInstance(ctx, officer, good)
	check(t, err)
	inst, b, err := h.s.PrepareInstance(ctx, officer, good)
	check(t, err)
	if inst.Name != "db9" || !inst.Enrolled.IsZero() {
		t.Errorf("instance %+v", inst)
	}
	if _, err := redeem(h, a.Text, "10.0.0.1:1"); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("token of the first call: %v", err)
	}
	if p, err := redeem(h, b.Text, "10.0.0.1:1"); p != "host/db9" || err != nil {
		t.Errorf("token of the second call: %q, %v", p, err)
	}
	if _, _, err := h.s.PrepareInstance(ctx, officer, good); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("after it enrolled: %v", err)
	}
	h.wantPrepared(t, "db9")
}

// wantPrepared checks that an instance of keyring r works, and what it may
// report, also after a restart.
func (h *house) wantPrepared(t *testing.T, name string) {
	t.Helper()
	ctx := t.Context()
	host := kms.Caller{Principal: "host/" + name}
	v, err := h.s.OpenInstance(ctx, host, kms.OpenInstance{Instance: name, Cold: true})
	check(t, err)
	if v.Instance.Enrolled.IsZero() || len(v.Keyrings) != 1 || v.Keyrings[0].Versions[0].Wrapped == nil || v.Checkpoint == nil {
		t.Errorf("open: %+v", v)
	}
	check(t, h.s.ReportUsage(ctx, host, name, []kms.Usage{{Keyring: "r", Version: 1, Last: time.Now()}}))
	if err := h.s.ReportUsage(ctx, host, name, []kms.Usage{{Keyring: "s", Version: 1}}); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("report on a foreign keyring: %v", err)
	}
	h.reopen()
	for _, i := range must(h.s.Instances(ctx, officer)) {
		if i.Name == name && len(i.Usage) != 1 {
			t.Errorf("usage after a restart: %+v", i)
		}
	}
}

// TestRedeemFlood: a stranger who goes on trying after being blocked leaves a
// handful of records, not one for each try.
func TestRedeemFlood(t *testing.T) {
	h := newHouse(t, "")
	before := len(h.journal.events)
	for range 1000 {
		if _, err := redeem(h, "kwt1_nonsense", "10.9.9.9:1"); !errors.Is(err, dek.ErrDenied) {
			t.Fatalf("a guess: %v", err)
		}
	}
	var counts []int
	for _, e := range h.journal.events[before:] {
		if e.Count > 0 {
			counts = append(counts, e.Count)
		}
	}
	if n := len(h.journal.events) - before; n > 25 || len(counts) < 5 || counts[len(counts)-1] != 512 {
		t.Errorf("1000 tries left %d records, those of the blocked host count %v", n, counts)
	}
}
