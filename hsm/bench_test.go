package hsm_test

import (
	"context"
	"crypto"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/miekg/pkcs11"
)

// rawToken is the other side of the comparison: C_DecryptInit and C_Decrypt
// through miekg's binding, in this process, with kept handles and one session
// per worker.
type rawToken struct {
	ctx      *pkcs11.Ctx
	sessions []pkcs11.SessionHandle
	key      pkcs11.ObjectHandle
}

func openRaw(b *testing.B, cfg hsm.Config, id dek.ObjectID, workers int) *rawToken {
	b.Helper()
	for _, e := range cfg.Env {
		name, value, _ := strings.Cut(e, "=")
		b.Setenv(name, value)
	}
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	r := &rawToken{ctx: pkcs11.New(cfg.Module)}
	must(r.ctx.Initialize())
	b.Cleanup(func() { r.ctx.Finalize() })
	slots, err := r.ctx.GetSlotList(true)
	must(err)
	for range workers {
		s, err := r.ctx.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
		must(err)
		r.sessions = append(r.sessions, s)
	}
	must(r.ctx.Login(r.sessions[0], pkcs11.CKU_USER, hsmtest.PIN))
	must(r.ctx.FindObjectsInit(r.sessions[0], []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:])}))
	found, _, err := r.ctx.FindObjects(r.sessions[0], 2)
	must(err)
	must(r.ctx.FindObjectsFinal(r.sessions[0]))
	if len(found) != 1 {
		b.Fatalf("%d keys", len(found))
	}
	r.key = found[0]
	return r
}

func (r *rawToken) decrypt(worker int, inner []byte) error {
	mech := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP,
		pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil))}
	if err := r.ctx.DecryptInit(r.sessions[worker], mech, r.key); err != nil {
		return err
	}
	_, err := r.ctx.Decrypt(r.sessions[worker], inner)
	return err
}

// rate runs op on so many goroutines for d and returns operations per second.
func rate(b *testing.B, callers int, d time.Duration, op func(caller int) error) (perSecond float64) {
	b.Helper()
	var n atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	end := begin.Add(d)
	for i := range callers {
		wg.Go(func() {
			for time.Now().Before(end) {
				if err := op(i); err != nil {
					b.Error(err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(n.Load()) / time.Since(begin).Seconds()
}

// BenchmarkDecrypt compares DecryptKey of 64 callers through the child with raw
// C_Decrypt on the same SoftHSM token, in turns. "ratio" is the median of the
// rounds; one round per iteration: run with -benchtime=9x or so.
func BenchmarkDecrypt(b *testing.B) {
	workers := runtime.NumCPU()
	cfg := hsmtest.SoftHSM(b, "bench")
	tok := hsmtest.Open(b, cfg)
	id := hsmtest.NewID()
	pub, err := tok.GeneratePair(b.Context(), id, 2048)
	if err != nil {
		b.Fatal(err)
	}
	inner := hsmtest.Encrypt(b, pub, crypto.SHA1, make([]byte, 32))
	raw := openRaw(b, cfg, id, workers)
	ours := func(int) error {
		k, err := tok.DecryptKey(context.Background(), id, crypto.SHA1, inner)
		k.Destroy()
		return err
	}
	other := func(w int) error { return raw.decrypt(w, inner) }
	const slice = 500 * time.Millisecond
	rate(b, 64, slice, ours)
	var ratios, rawRates []float64
	for b.Loop() {
		before := rate(b, workers, slice, other)
		mine := rate(b, 64, slice, ours)
		after := rate(b, workers, slice, other)
		ratios = append(ratios, mine/((before+after)/2))
		rawRates = append(rawRates, (before+after)/2)
	}
	b.ReportMetric(median(ratios), "ratio")
	b.ReportMetric(median(rawRates), "raw/s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkOverhead is the CPU that this process spends per call of 64 callers
// (the child's share shows in BenchmarkDecrypt).
func BenchmarkOverhead(b *testing.B) {
	cfg := hsmtest.SoftHSM(b, "overhead")
	tok := hsmtest.Open(b, cfg)
	id := hsmtest.NewID()
	pub, err := tok.GeneratePair(b.Context(), id, 2048)
	if err != nil {
		b.Fatal(err)
	}
	inner := hsmtest.Encrypt(b, pub, crypto.SHA1, make([]byte, 32))
	b.SetParallelism(32)
	before := cpu(b)
	b.ReportAllocs()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			k, err := tok.DecryptKey(context.Background(), id, crypto.SHA1, inner)
			if err != nil {
				b.Error(err)
				return
			}
			k.Destroy()
		}
	})
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "parent-cpu-us/op")
}

func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}
