package rpc

import (
	"fmt"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/keyward/keyward/kms/kmspb"
)

// A codec is protobuf with two habits of this house: what is wrong with a
// request is told to the chain, not by gRPC to the client, and replies with
// keys are wiped, message and buffer, once they are sent. The transport below
// has copies of its own that we can't reach.
type codec struct{ wiping wipingPool }

func newCodec() *codec { return &codec{wipingPool{mem.DefaultBufferPool()}} }

// An envelope takes a request of at most maxBytes off the wire, or says why
// it can't. The chain hands one to gRPC in place of the message.
type envelope struct {
	message  any
	maxBytes int
	err      error
}

// Name implements encoding.CodecV2.
func (*codec) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (c *codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("rpc: internal error: reply is a %T", v)
	}
	size := proto.Size(m)
	var pool mem.BufferPool = c.wiping
	if !wipe(m, false) {
		pool = mem.DefaultBufferPool()
	}
	// Buffers below the pooling threshold are never given back, so a secret
	// gets a larger one.
	buf := pool.Get(max(size, pooledBytes))
	out, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend((*buf)[:0], m)
	if err != nil {
		pool.Put(buf)
		return nil, fmt.Errorf("rpc: internal error: encode %T", v)
	}
	*buf = out
	wipe(m, true)
	return mem.BufferSlice{mem.NewBuffer(buf, pool)}, nil
}

// Unmarshal implements encoding.CodecV2. It fails inside the envelope only.
func (c *codec) Unmarshal(data mem.BufferSlice, v any) error {
	e, ok := v.(*envelope)
	if !ok {
		return fmt.Errorf("rpc: internal error: request read into a %T", v)
	}
	m, ok := e.message.(proto.Message)
	switch {
	case !ok:
		e.err = fmt.Errorf("rpc: internal error: request is a %T", e.message)
	case data.Len() > e.maxBytes:
		e.err = invalid("request of %d bytes is longer than %d", data.Len(), e.maxBytes)
	default:
		buf := data.MaterializeToBuffer(c.wiping) // tokens come this way
		defer buf.Free()
		if proto.Unmarshal(buf.ReadOnlyData(), m) != nil {
			e.err = invalid("request is not the method's message")
		}
	}
	return nil
}

// pooledBytes is above the threshold of package mem (1 KiB).
const pooledBytes = 2048

// wipe reports whether m is a reply with keys, and clears them if asked to.
func wipe(m proto.Message, now bool) bool {
	switch r := m.(type) {
	case *kmspb.UnwrapResponse:
		if now {
			clear(r.GetKey())
		}
		return true
	case *kmspb.UnwrapBatchResponse:
		for _, item := range r.GetItems() {
			wipe(item, now)
		}
		return true
	}
	return false
}

// A wipingPool clears buffers before others get them.
type wipingPool struct{ mem.BufferPool }

// Put implements mem.BufferPool.
func (p wipingPool) Put(b *[]byte) {
	clear((*b)[:cap(*b)])
	p.BufferPool.Put(b)
}
