package hsmtest_test

import (
	"context"
	"errors"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm/hsmtest"
)

func TestFakeFaults(t *testing.T) {
	f := hsmtest.NewFake(t)
	ctx := t.Context()
	a, b := hsmtest.NewID(), hsmtest.NewID()

	f.Fail(hsmtest.OpGeneratePair, hsmtest.NotDone, nil)
	if _, err := f.GeneratePair(ctx, a, 2048); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("not done: got %v", err)
	}
	if _, err := f.FindPair(ctx, a); !errors.Is(err, dek.ErrNotFound) {
		t.Errorf("after not done: got %v", err)
	}
	f.Fail(hsmtest.OpGeneratePair, hsmtest.Done, dek.ErrConflict)
	if _, err := f.GeneratePair(ctx, b, 2048); !errors.Is(err, dek.ErrConflict) {
		t.Errorf("done: got %v", err)
	}
	if _, err := f.FindPair(ctx, b); err != nil {
		t.Errorf("after done: %v", err)
	}
	f.Fail(hsmtest.OpHealth, hsmtest.Hangs, nil)
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := f.Health(ended); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("hangs: got %v", err)
	}
	if err := f.Health(ctx); err != nil {
		t.Errorf("faults are spent: %v", err)
	}
	if n := f.Calls(hsmtest.OpGeneratePair); n != 2 {
		t.Errorf("%d calls, want 2", n)
	}
}
