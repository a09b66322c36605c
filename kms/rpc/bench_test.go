package rpc_test

import (
	"testing"

	"github.com/keyward/keyward/kms/kmspb"
)

// BenchmarkUnwrap is the door's own cost: mTLS, chain and codec, both ends in
// this process, nothing behind.
func BenchmarkUnwrap(b *testing.B) {
	d := openDoor(b)
	c := kmspb.NewInstancesClient(d.as(b, "host/db1"))
	r := &kmspb.UnwrapRequest{Wrapped: wrapped(b, 1)}
	b.ReportAllocs()
	b.SetParallelism(32)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, err := c.Unwrap(b.Context(), r); err != nil {
				b.Error(err)
			}
		}
	})
}

// BenchmarkUnwrapStream has 64 unwraps under way on one stream.
func BenchmarkUnwrapStream(b *testing.B) {
	d := openDoor(b)
	s, err := kmspb.NewInstancesClient(d.as(b, "host/db1")).UnwrapStream(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	r := &kmspb.UnwrapRequest{Wrapped: wrapped(b, 1)}
	b.ReportAllocs()
	sent := 0
	for i := 0; b.Loop(); i++ {
		for ; sent < i+64; sent++ {
			if err := s.Send(r); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := s.Recv(); err != nil {
			b.Fatal(err)
		}
	}
}
