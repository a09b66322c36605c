package kms_test

import (
	"context"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// A poorToken is a token without AES from some moment on: what it seals rests
// on RSA.
type poorToken struct {
	token
	poor  bool
	under map[string]bool
}

func (p *poorToken) SealKey(ctx context.Context, root dek.ObjectID, b dek.Binding, k *dek.Key) ([]byte, error) {
	sealed, err := p.token.SealKey(ctx, root, b, k)
	if p.poor {
		p.under[string(sealed)] = true
	}
	return sealed, err
}

func (p *poorToken) RestsOnRSA(sealed []byte) bool { return p.under[string(sealed)] }

// The post-quantum claim is withdrawn where one seal key rests on RSA: that of
// the records, or that of one vault.
func TestStatusWithdrawsPostQuantumClaim(t *testing.T) {
	claims := func(h *house) (n int) {
		for _, p := range must(h.s.Status(t.Context(), admin)).Problems {
			if p.Severity == "yellow" && strings.Contains(p.Text, "quantum") {
				n++
			}
		}
		return n
	}
	for name, poorAtInit := range map[string]bool{"records": true, "one vault": false} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t, "")
			h.furnish()
			if n := claims(h); n != 0 {
				t.Errorf("a token with AES: withdrawn %d times", n)
			}
			h.s.Close()
			fresh := h.elsewhere(true)
			p := &poorToken{token: fresh.token, poor: poorAtInit, under: map[string]bool{}}
			fresh.edit = func(c *kms.Config) { c.Token = p }
			fresh.init("")
			fresh.open()
			p.poor = true
			fresh.furnish()
			if n := claims(fresh); n != 1 {
				t.Errorf("withdrawn %d times, want once", n)
			}
			fresh.reopen()
			if n := claims(fresh); n != 1 {
				t.Errorf("after a restart: withdrawn %d times, want once", n)
			}
		})
	}
}
