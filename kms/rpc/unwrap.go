package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// streamWindow bounds the unwraps of one stream that are under way at once.
// What a client sends beyond waits in the stream's flow control.
const streamWindow = 64

// Unwrap answers one wrapped DEK.
func (i *instanceServer) Unwrap(ctx context.Context, r *kmspb.UnwrapRequest) (*kmspb.UnwrapResponse, error) {
	key, err := i.unwrap(ctx, r.GetWrapped())
	if err != nil {
		return nil, err
	}
	return &kmspb.UnwrapResponse{Tag: r.GetTag(), Key: key}, nil
}

// unwrap returns bytes that the codec wipes once they are sent.
func (i *instanceServer) unwrap(ctx context.Context, wrapped []byte) ([]byte, error) {
	w, err := wrappedField(wrapped)
	if err != nil {
		return nil, err
	}
	k, err := i.server.backend.Unwrapper.Unwrap(ctx, callerOf(ctx), w)
	if err != nil {
		return nil, err
	}
	return export(k)
}

// export copies a key out of its locked page and ends it.
func export(k *dek.Key) (out []byte, err error) {
	if k == nil {
		return nil, errInternal
	}
	defer k.Destroy()
	err = k.Use(func(b []byte) error {
		out = bytes.Clone(b)
		return nil
	})
	return out, err
}

// UnwrapBatch answers each item by itself, unless the call fails as a whole.
func (i *instanceServer) UnwrapBatch(ctx context.Context, r *kmspb.UnwrapBatchRequest) (*kmspb.UnwrapBatchResponse, error) {
	items := r.GetItems()
	if len(items) == 0 || len(items) > maxBatch {
		return nil, invalid("items: %d given, want 1 to %d", len(items), maxBatch)
	}
	resp := &kmspb.UnwrapBatchResponse{Items: make([]*kmspb.UnwrapResponse, len(items))}
	ws, at := make([]dek.Wrapped, 0, len(items)), make([]int, 0, len(items))
	for n, item := range items {
		resp.Items[n] = &kmspb.UnwrapResponse{Tag: item.GetTag()}
		w, err := wrappedField(item.GetWrapped())
		if err != nil {
			resp.Items[n].Code = itemCode(err)
			continue
		}
		ws, at = append(ws, w), append(at, n)
	}
	if bad := len(items) - len(ws); bad > 0 {
		s := i.server
		s.record(ctx, callOf(ctx), fmt.Errorf("%w: %d of %d items are no wrapped DEK", dek.ErrAuth, bad, len(items)))
	}
	if len(ws) == 0 {
		return resp, nil
	}
	keys, errs, err := i.server.backend.Unwrapper.UnwrapBatch(ctx, callerOf(ctx), ws)
	if err != nil {
		return nil, err
	}
	if len(keys) != len(ws) || len(errs) != len(ws) {
		return nil, errInternal
	}
	for n := range ws {
		item, err := resp.Items[at[n]], errs[n]
		if err == nil {
			item.Key, err = export(keys[n])
		}
		item.Code = itemCode(err)
	}
	return resp, nil
}

// itemCode is the code of one item; items carry no words.
func itemCode(err error) uint32 {
	if err == nil {
		return 0
	}
	return uint32(classify(err).code)
}

// UnwrapStream answers in order of completion. The receiver stops at the
// window; this goroutine alone sends.
func (i *instanceServer) UnwrapStream(stream grpc.BidiStreamingServer[kmspb.UnwrapRequest, kmspb.UnwrapResponse]) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	answers := make(chan *kmspb.UnwrapResponse)
	i.server.running.Go(func() {
		err := contain(func() error { return i.receive(ctx, stream, answers) })
		if err != nil {
			cancel(err)
		}
		close(answers)
	})
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case a, ok := <-answers:
			if !ok {
				return context.Cause(ctx)
			}
			if err := stream.Send(a); err != nil {
				return err
			}
		}
	}
}

// receive reads until the client is done, and returns when every answer is on
// its way or ctx has ended.
func (i *instanceServer) receive(ctx context.Context, stream grpc.BidiStreamingServer[kmspb.UnwrapRequest, kmspb.UnwrapResponse], answers chan<- *kmspb.UnwrapResponse) error {
	window := make(chan struct{}, streamWindow)
	var working sync.WaitGroup
	defer working.Wait()
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = i.server.standing(callOf(ctx))
		}
		if err != nil {
			return err
		}
		select {
		case window <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		working.Go(func() {
			defer func() { <-window }()
			a := i.answer(ctx, r)
			select {
			case answers <- a:
			case <-ctx.Done():
				clear(a.GetKey())
			}
		})
	}
}

// answer is one item of a stream, with a deadline and a place in the lane of
// its own.
func (i *instanceServer) answer(ctx context.Context, r *kmspb.UnwrapRequest) *kmspb.UnwrapResponse {
	s, c := i.server, callOf(ctx)
	a := &kmspb.UnwrapResponse{Tag: r.GetTag()}
	row := s.rows[kmspb.Instances_Unwrap_FullMethodName]
	ctx, cancel := context.WithTimeout(ctx, row.deadline)
	defer cancel()
	leave, err := s.enterLane(ctx, row, c.sharer())
	if err == nil {
		defer leave()
		err = contain(func() (err error) {
			a.Key, err = i.unwrap(ctx, r.GetWrapped())
			return err
		})
	}
	if errors.As(err, new(refusal)) {
		s.record(context.WithoutCancel(ctx), c, err)
	}
	if p := new(panicked); errors.As(err, &p) {
		s.config.Logger.Error("unwrap failed", "request", c.caller.Correlation, "error", p, "stack", p.stack)
	}
	a.Code = itemCode(err)
	s.metrics.calls.WithLabelValues(row.name, reasonOf(err)).Inc()
	return a
}

func reasonOf(err error) string {
	if err == nil {
		return "OK"
	}
	return classify(err).reason
}
