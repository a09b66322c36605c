package main

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" // SoftHSM 2.6.1 knows OAEP with SHA-1 only
	"fmt"
	"io"
	"math/big"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
	"golang.org/x/sync/errgroup"
)

// rawDecrypt is the limit: C_Decrypt on the same token from a process of its
// own, one session per CPU, nothing else done. It prints operations a second
// and the CPU us of one.
// Arguments: module, PIN file, milliseconds.
func rawDecrypt(args []string, stdout io.Writer) error {
	if len(args) != 3 {
		return fmt.Errorf("want MODULE PINFILE MILLISECONDS")
	}
	pin, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	var ms int
	if _, err := fmt.Sscan(args[2], &ms); err != nil {
		return err
	}
	p := pkcs11.New(args[0])
	if p == nil {
		return fmt.Errorf("can't load %s", args[0])
	}
	defer p.Destroy()
	if err := p.Initialize(); err != nil {
		return err
	}
	defer func() { _ = p.Finalize() }()
	workers := make([]*rawWorker, runtime.NumCPU())
	for i := range workers {
		if workers[i], err = newRawWorker(p, strings.TrimSpace(string(pin)), i == 0); err != nil {
			return err
		}
	}
	before, err := ownCPU()
	if err != nil {
		return err
	}
	ops, took, err := drive(workers, time.Duration(ms)*time.Millisecond)
	if err != nil {
		return err
	}
	after, err := ownCPU()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%f %f\n", ops/took.Seconds(), float64((after-before).Microseconds())/ops)
	return err
}

type rawWorker struct {
	p       *pkcs11.Ctx
	session pkcs11.SessionHandle
	key     pkcs11.ObjectHandle
	ct      []byte
}

func newRawWorker(p *pkcs11.Ctx, pin string, login bool) (*rawWorker, error) {
	slots, err := p.GetSlotList(true)
	if err != nil {
		return nil, err
	}
	w := &rawWorker{p: p}
	for _, slot := range slots {
		info, err := p.GetTokenInfo(slot)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		if w.session, err = p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION); err != nil {
			return nil, err
		}
		if login {
			if err := p.Login(w.session, pkcs11.CKU_USER, pin); err != nil {
				return nil, err
			}
		}
		return w, w.findKey()
	}
	return nil, fmt.Errorf("no initialised token")
}

// findKey takes any RSA-2048 key that decrypts and encrypts a key to it.
func (w *rawWorker) findKey() error {
	err := w.p.FindObjectsInit(w.session, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
	})
	if err != nil {
		return err
	}
	found, _, err := w.p.FindObjects(w.session, 100)
	if ferr := w.p.FindObjectsFinal(w.session); err == nil {
		err = ferr
	}
	if err != nil {
		return err
	}
	for _, h := range found {
		attrs, err := w.p.GetAttributeValue(w.session, h, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_MODULUS, nil), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, nil)})
		if err != nil || len(attrs[0].Value) != 256 {
			continue
		}
		pub := &rsa.PublicKey{N: new(big.Int).SetBytes(attrs[0].Value), E: int(new(big.Int).SetBytes(attrs[1].Value).Int64())}
		w.key = h
		w.ct, err = rsa.EncryptOAEP(sha1.New(), rand.Reader, pub, make([]byte, 32), nil)
		return err
	}
	return fmt.Errorf("no RSA-2048 key that decrypts among %d", len(found))
}

func (w *rawWorker) decrypt() error {
	mech := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP,
		pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil))}
	if err := w.p.DecryptInit(w.session, mech, w.key); err != nil {
		return err
	}
	_, err := w.p.Decrypt(w.session, w.ct)
	return err
}

// drive has all workers decrypt for a time and counts.
func drive(workers []*rawWorker, d time.Duration) (ops float64, took time.Duration, err error) {
	var done atomic.Int64
	var g errgroup.Group
	start := time.Now()
	for _, w := range workers {
		g.Go(func() error {
			for time.Since(start) < d {
				if err := w.decrypt(); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}
	err = g.Wait()
	return float64(done.Load()), time.Since(start), err
}
