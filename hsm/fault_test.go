package hsm_test

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// sessionErrors are what a PKCS#11 library answers when something is wrong with
// the device, the session or the login, and nothing with the input. The last
// two are also what SoftHSM and openCryptoki answer for bad ciphertexts.
var sessionErrors = []uint32{0x30, 0x32, 0x82, 0xB0, 0xB3, 0xE0, 0xE1, 0x90, 0x101, 0x190, 0x05, 0x06}

// A faulty is a SoftHSM token behind the shim, with one master key.
type faulty struct {
	*hsm.Token
	cfg   hsm.Config
	shim  *hsmtest.Shim
	id    dek.ObjectID
	inner []byte
}

func openFaulty(t *testing.T, edit func(*hsm.Config)) *faulty {
	t.Helper()
	cfg, shim := hsmtest.Misbehave(t, hsmtest.SoftHSM(t, "faulty"))
	cfg.Deadline = 2 * time.Second
	if edit != nil {
		edit(&cfg)
	}
	f := &faulty{Token: hsmtest.Open(t, cfg), cfg: cfg, shim: shim, id: hsmtest.NewID()}
	pub, err := f.GeneratePair(t.Context(), f.id, 2048)
	if err != nil {
		t.Fatal(err)
	}
	f.inner = hsmtest.Encrypt(t, pub, crypto.SHA1, make([]byte, 32))
	if err := f.decrypt(t); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *faulty) decrypt(t *testing.T) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	k, err := f.DecryptKey(ctx, f.id, crypto.SHA1, f.inner)
	k.Destroy()
	return err
}

// recovers wants an answer within limit. Calls fail fast while starts fail, so
// a ticker paces them.
func (f *faulty) recovers(t *testing.T, limit time.Duration) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(limit)
	for {
		err := f.decrypt(t)
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Errorf("not recovered after %v: %v", limit, err)
			return
		}
	}
}

func wantClass(t *testing.T, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: got %v, want %v", what, err, class)
	}
}

func TestSessionErrorOnce(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	for _, rv := range sessionErrors {
		f.shim.Set(hsmtest.DecryptRV, rv)
		f.shim.Set(hsmtest.DecryptCount, 1)
		if err := f.decrypt(t); err != nil {
			t.Errorf("%#x once: %v", rv, err)
		}
	}
	if n := f.shim.Get(hsmtest.Logins); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

func TestSessionErrorEveryTenth(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	f.shim.Set(hsmtest.DecryptNth, 10)
	f.shim.Set(hsmtest.DecryptCount, 1<<31)
	for _, rv := range sessionErrors {
		f.shim.Set(hsmtest.DecryptRV, rv)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 10 {
					if err := f.decrypt(t); err != nil {
						t.Errorf("%#x every tenth: %v", rv, err)
					}
				}
			})
		}
		wg.Wait()
	}
	if n := f.shim.Get(hsmtest.Logins); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

// Persistent errors are an outage, never "your ciphertext is bad", and end. The
// tokens wait for their back-off side by side.
func TestSessionErrorPersistent(t *testing.T) {
	t.Parallel()
	var wg sync.WaitGroup
	for _, rv := range sessionErrors {
		f := openFaulty(t, nil)
		wg.Go(func() {
			f.shim.Set(hsmtest.DecryptRV, rv)
			f.shim.Set(hsmtest.DecryptCount, 1<<31)
			err := f.decrypt(t)
			if errors.Is(err, dek.ErrAuth) || !errors.Is(err, dek.ErrUnavailable) && !errors.Is(err, dek.ErrPrecondition) {
				t.Errorf("%#x: got %v, want ErrUnavailable", rv, err)
			}
			f.shim.Set(hsmtest.DecryptCount, 0)
			f.recovers(t, 15*time.Second)
		})
	}
	wg.Wait()
}

func TestHang(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, func(c *hsm.Config) { c.Deadline = 500 * time.Millisecond; c.Workers = 2 })
	f.shim.Set(hsmtest.HangCount, 2)
	begin := time.Now()
	var wg sync.WaitGroup
	for range 8 { // two hang, the others are behind them: all get an answer
		wg.Go(func() { wantClass(t, "call", f.decrypt(t), dek.ErrUnavailable) })
	}
	wg.Wait()
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("answered after %v", d)
	}
	f.recovers(t, 5*time.Second)
}

// A caller that gives up costs the child nothing.
func TestCallerGivesUp(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	for range 50 {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Microsecond)
		k, err := f.DecryptKey(ctx, f.id, crypto.SHA1, f.inner)
		cancel()
		if err == nil {
			k.Destroy()
		} else {
			wantClass(t, "given up", err, dek.ErrUnavailable)
		}
	}
	if err := f.decrypt(t); err != nil {
		t.Error(err)
	}
	if n := f.shim.Get(hsmtest.Inits); n != 1 {
		t.Errorf("%d starts, want 1", n)
	}
}

func TestHangWhileGenerating(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, func(c *hsm.Config) { c.GenerateDeadline = 4 * time.Second })
	f.shim.Set(hsmtest.HangGenerate, 1)
	_, err := f.GeneratePair(t.Context(), hsmtest.NewID(), 2048)
	wantClass(t, "generate", err, dek.ErrUnavailable)
	f.recovers(t, 5*time.Second)
}

func TestHangWhileStarting(t *testing.T) {
	t.Parallel()
	cfg, shim := hsmtest.Misbehave(t, hsmtest.SoftHSM(t, "hanging"))
	shim.Set(hsmtest.HangLogin, 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := hsm.Open(ctx, cfg)
	wantClass(t, "open", err, dek.ErrUnavailable)
	hsmtest.Open(t, cfg)
}

func TestCrash(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	f.shim.Set(hsmtest.DieCount, 1)
	wantClass(t, "crash", f.decrypt(t), dek.ErrUnavailable)
	f.recovers(t, 5*time.Second)
	if n := f.shim.Get(hsmtest.Logins); n != 2 {
		t.Errorf("%d logins, want 2", n)
	}
}

// All sessions lost means logged out: nobody notices, thanks to a new child.
func TestSessionsLost(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	f.shim.Set(hsmtest.LoseCount, 1)
	if err := f.decrypt(t); err != nil {
		t.Errorf("sessions lost: %v", err)
	}
	if _, err := f.FindPair(t.Context(), f.id); err != nil {
		t.Errorf("find: %v", err)
	}
}

func TestSignErrors(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	id := hsmtest.NewID()
	if _, err := f.GenerateSigner(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for _, rv := range sessionErrors {
		f.shim.Set(hsmtest.SignRV, rv)
		f.shim.Set(hsmtest.SignCount, 1)
		if _, err := f.Sign(t.Context(), id, make([]byte, 32)); err != nil {
			t.Errorf("%#x once: %v", rv, err)
		}
		f.shim.Set(hsmtest.SignCount, 3)
		_, err := f.Sign(t.Context(), id, make([]byte, 32))
		wantClass(t, fmt.Sprintf("%#x three times", rv), err, dek.ErrUnavailable)
		f.shim.Set(hsmtest.SignCount, 0)
	}
	if n := f.shim.Get(hsmtest.Inits); n != 1 {
		t.Errorf("%d starts, want 1: one object's fault is not the device's", n)
	}
}

// Good sealed keys are never called bad because of the device.
func TestOpenErrors(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	root, place := hsmtest.NewID(), dek.Binding{Purpose: dek.PurposeSealKey, Vault: "acme"}
	if err := f.GenerateRoot(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	k, err := dek.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Destroy()
	sealed, err := f.SealKey(t.Context(), root, place, k)
	if err != nil {
		t.Fatal(err)
	}
	for _, rv := range sessionErrors {
		for count := range uint32(3) {
			f.shim.Set(hsmtest.DecryptRV, rv)
			f.shim.Set(hsmtest.DecryptCount, count)
			got, err := f.OpenKey(t.Context(), root, place, sealed)
			if err != nil || !got.Equal(k) {
				t.Errorf("%#x, %d times: %v", rv, count, err)
			}
			got.Destroy()
		}
	}
	f.shim.Set(hsmtest.DecryptRV, 0x05)
	f.shim.Set(hsmtest.DecryptCount, 1<<31)
	_, err = f.OpenKey(t.Context(), root, place, sealed)
	if err == nil || errors.Is(err, dek.ErrAuth) {
		t.Errorf("device out of order: got %v", err)
	}
	f.shim.Set(hsmtest.DecryptCount, 0)
	f.recovers(t, 10*time.Second)
}

func TestHandlesAreKept(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	before := f.shim.Get(hsmtest.Searches)
	for range 100 {
		if err := f.decrypt(t); err != nil {
			t.Fatal(err)
		}
	}
	if n := f.shim.Get(hsmtest.Searches) - before; n != 0 {
		t.Errorf("%d searches in 100 decrypts, want 0", n)
	}
	if n := f.shim.Get(hsmtest.Inits); n != 1 {
		t.Errorf("%d initialisations, want 1", n)
	}
}

func TestTokenGoneAndBack(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	dir := hsmtest.TokenDir(filepath.Dir(f.cfg.PINFile))
	rename(t, dir, dir+".away")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f.shim.Set(hsmtest.DieCount, 1) // SoftHSM answers from memory until then
	wantClass(t, "crash", f.decrypt(t), dek.ErrUnavailable)
	for range 3 {
		wantClass(t, "gone", f.decrypt(t), dek.ErrUnavailable)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	rename(t, dir+".away", dir)
	f.recovers(t, 15*time.Second)
}

func TestTokenSwapped(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	base := filepath.Dir(f.cfg.PINFile)
	dir := hsmtest.TokenDir(base)
	rename(t, dir, dir+".away")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	hsmtest.InitSoftHSM(t, base, "faulty") // same label, same PIN, another token
	logins := f.shim.Get(hsmtest.Logins)
	f.shim.Set(hsmtest.DieCount, 1)
	if err := f.decrypt(t); err == nil { // this one or the next finds the stranger
		t.Error("swapped: a call worked")
	}
	err := f.decrypt(t)
	wantClass(t, "swapped", err, dek.ErrPrecondition)
	if err != nil && !strings.Contains(err.Error(), f.Identity().Serial) {
		t.Errorf("%q does not name what was expected", err)
	}
	wantClass(t, "health", f.Health(t.Context()), dek.ErrPrecondition)
	if n := f.shim.Get(hsmtest.Logins); n != logins {
		t.Errorf("the stranger got the PIN %d times", n-logins)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	rename(t, dir+".away", dir)
	f.recovers(t, 15*time.Second)
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestExpectedIdentity(t *testing.T) {
	t.Parallel()
	cfg, shim := hsmtest.Misbehave(t, hsmtest.SoftHSM(t, "pinned"))
	tok := hsmtest.Open(t, cfg)
	id := tok.Identity()
	tok.Close()
	cfg.Expect = id
	hsmtest.Open(t, cfg).Close()
	logins := shim.Get(hsmtest.Logins)
	for _, edit := range []func(*hsm.Identity){
		func(i *hsm.Identity) { i.Serial = "0000" },
		func(i *hsm.Identity) { i.Label = "other" },
		func(i *hsm.Identity) { i.Model = "other" },
		func(i *hsm.Identity) { i.Fingerprint = strings.Repeat("0", 64) },
	} {
		cfg.Expect = id
		edit(&cfg.Expect)
		_, err := hsm.Open(t.Context(), cfg)
		wantClass(t, fmt.Sprintf("%+v", cfg.Expect), err, dek.ErrPrecondition)
	}
	if n := shim.Get(hsmtest.Logins); n != logins {
		t.Errorf("the PIN was used %d times on the wrong token", n-logins)
	}
}

func TestTwoTokensMatch(t *testing.T) {
	t.Parallel()
	cfg := hsmtest.SoftHSM(t, "twin")
	hsmtest.InitSoftHSM(t, filepath.Dir(cfg.PINFile), "twin")
	_, err := hsm.Open(t.Context(), cfg)
	wantClass(t, "ambiguous label", err, dek.ErrPrecondition)
	cfg.TokenURI = "pkcs11:token=missing"
	_, err = hsm.Open(t.Context(), cfg)
	wantClass(t, "unknown label", err, dek.ErrUnavailable)
}

// The child ends with its parent, and the PIN is in nobody's argv or environ.
func TestChildKeepsPIN(t *testing.T) {
	cfg := hsmtest.SoftHSM(t, "secretive")
	tok := hsmtest.Open(t, cfg)
	found := 0
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		cmd, err := os.ReadFile(p)
		if err != nil || !bytes.Contains(cmd, []byte(cfg.Child[1])) {
			continue
		}
		found++
		env, err := os.ReadFile(filepath.Join(filepath.Dir(p), "environ"))
		if err == nil && bytes.Contains(env, []byte(hsmtest.PIN)) || bytes.Contains(cmd, []byte(hsmtest.PIN)) {
			t.Errorf("the PIN is in %s", p)
		}
	}
	if found == 0 {
		t.Error("no child found")
	}
	if text := fmt.Sprintf("%v %+v %#v", tok, tok.Identity(), tok.Capabilities()); strings.Contains(text, hsmtest.PIN) {
		t.Error("the PIN is printed")
	}
}
