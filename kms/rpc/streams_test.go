package rpc_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/kmspb"
	"github.com/keyward/keyward/kms/rpc"
)

// watch opens a Watch and waits for its first notice: the stream is served.
func watch(t *testing.T, c kmspb.InstancesClient) kmspb.Instances_WatchClient {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	w, err := c.Watch(ctx, &kmspb.WatchRequest{Instance: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := w.Recv(); err != nil || n.GetKind() != kmspb.Notice_KIND_PING {
		t.Fatalf("first notice: got %v, %v", n, err)
	}
	return w
}

func TestWatch(t *testing.T) {
	d := openDoor(t)
	w := watch(t, kmspb.NewInstancesClient(d.as(t, "host/db1")))
	kinds := []kms.NoticeKind{kms.NoticePing, kms.NoticeRolled, kms.NoticeDisabled, kms.NoticeEnabled, kms.NoticeRewrapped, kms.NoticeRevoked}
	want := []kmspb.Notice_Kind{kmspb.Notice_KIND_PING, kmspb.Notice_KIND_ROLLED, kmspb.Notice_KIND_DISABLED,
		kmspb.Notice_KIND_ENABLED, kmspb.Notice_KIND_REWRAPPED, kmspb.Notice_KIND_REVOKED}
	for i, k := range kinds {
		d.house.notices <- kms.Notice{Kind: k, Keyring: "r", Generation: uint64(i), Checkpoint: []byte("c")}
		n, err := w.Recv()
		if err != nil || n.GetKind() != want[i] || n.GetKeyring() != "r" || n.GetGeneration() != uint64(i) || string(n.GetCheckpoint()) != "c" {
			t.Errorf("notice %d: got %v, %v, want %v", k, n, err, want[i])
		}
	}
}

// TestRevocationCutsStreams: wherever the revocation was made, open streams
// end within a second, with the class; calls are refused from the same moment.
func TestRevocationCutsStreams(t *testing.T) {
	d := openDoor(t)
	conn := d.as(t, "host/db1")
	c := kmspb.NewInstancesClient(conn)
	other := watch(t, kmspb.NewInstancesClient(d.as(t, "host/db2")))
	w := watch(t, c)
	unwraps, err := c.UnwrapStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := unwraps.Send(&kmspb.UnwrapRequest{Wrapped: wrapped(t, 1)}); err != nil {
		t.Fatal(err)
	}
	if _, err := unwraps.Recv(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	d.house.set(func(h *house) { h.revoked["host/db1"] = true }) // on another node
	for name, recv := range map[string]func() error{
		"watch":  func() error { _, err := w.Recv(); return err },
		"unwrap": func() error { _, err := unwraps.Recv(); return err },
	} {
		if err := recv(); status.Code(err) != codes.PermissionDenied || reason(status.Convert(err)) != "DENIED" {
			t.Errorf("%s: got %v, want PermissionDenied", name, err)
		}
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("cut after %v, want at most a second", took)
	}
	if _, err := c.Report(t.Context(), &kmspb.ReportRequest{Instance: "db1"}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("call: got %v, want PermissionDenied", err)
	}
	d.house.notices <- kms.Notice{Kind: kms.NoticeRolled}
	if n, err := other.Recv(); err != nil || n.GetKind() != kmspb.Notice_KIND_ROLLED {
		t.Errorf("the other host's stream: got %v, %v", n, err)
	}
	if e := d.ledger.take(); len(e) < 2 || e[0].Principal != "host/db1" || e[0].Result != "denied" {
		t.Errorf("records: got %+v", e)
	}
}

// TestRevocationAtThisDoor cuts before it answers.
func TestRevocationAtThisDoor(t *testing.T) {
	d := openDoor(t)
	w := watch(t, kmspb.NewInstancesClient(d.as(t, "host/db1")))
	admin := kmspb.NewAdminClient(d.as(t, "person/a"))
	if _, err := admin.RevokeIdentity(t.Context(), &kmspb.RevokeIdentityRequest{Principal: "host/db1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v, want PermissionDenied", err)
	}
}

// TestDeafStreamLosesItsConnection: a client that does not read can't keep a
// revoked stream open.
func TestDeafStreamLosesItsConnection(t *testing.T) {
	d := openDoor(t)
	block, inside := make(chan struct{}), make(chan struct{}, 1)
	w := watch(t, kmspb.NewInstancesClient(d.as(t, "host/db1")))
	d.house.set(func(h *house) {
		h.enter = func(context.Context) error { inside <- struct{}{}; <-block; return nil } // deaf to its context
	})
	second, err := kmspb.NewInstancesClient(d.as(t, "host/db1")).Watch(t.Context(), &kmspb.WatchRequest{Instance: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	<-inside
	d.house.set(func(h *house) { h.revoked["host/db1"] = true })
	if _, err := second.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want a connection that is gone", err)
	}
	if _, err := w.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v, want PermissionDenied", err)
	}
	close(block)
}

func TestExpiryCutsStreams(t *testing.T) {
	d := openDoor(t)
	w := watch(t, kmspb.NewInstancesClient(d.as(t, "host/db1")))
	d.clock.jump(8 * 24 * time.Hour)
	if _, err := w.Recv(); status.Code(err) != codes.Unauthenticated || reason(status.Convert(err)) != "UNAVAILABLE" {
		t.Errorf("got %v, want Unauthenticated UNAVAILABLE", err)
	}
}

func TestUnwrapStreamAnswersInOrderOfCompletion(t *testing.T) {
	d := openDoor(t)
	slow, started := make(chan struct{}), make(chan struct{}, 1)
	var once sync.Once
	d.house.set(func(h *house) {
		h.enter = func(ctx context.Context) error {
			wait := false
			once.Do(func() { wait = true })
			if wait {
				started <- struct{}{}
				<-slow
			}
			return nil
		}
	})
	s, err := kmspb.NewInstancesClient(d.as(t, "host/db1")).UnwrapStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&kmspb.UnwrapRequest{Tag: 1, Wrapped: wrapped(t, 1)}); err != nil {
		t.Fatal(err)
	}
	<-started
	if err := s.Send(&kmspb.UnwrapRequest{Tag: 2, Wrapped: wrapped(t, 2)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&kmspb.UnwrapRequest{Tag: 3, Wrapped: []byte("bad")}); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	got := map[uint64]*kmspb.UnwrapResponse{}
	for range 2 {
		a, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		got[a.GetTag()] = a
	}
	if a := got[2]; a == nil || a.GetCode() != 0 || len(a.GetKey()) != 32 || a.GetKey()[0] != 2 {
		t.Errorf("second: got %v", a)
	}
	if a := got[3]; a == nil || codes.Code(a.GetCode()) != codes.InvalidArgument || len(a.GetKey()) != 0 {
		t.Errorf("third: got %v", a)
	}
	close(slow)
	if a, err := s.Recv(); err != nil || a.GetTag() != 1 || a.GetKey()[0] != 1 {
		t.Errorf("first: got %v, %v", a, err)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("end: got %v, want EOF", err)
	}
	if e := d.ledger.take(); len(e) != 1 || e[0].Result != "auth" {
		t.Errorf("records: got %+v, want the bad one", e)
	}
}

// TestUnwrapStreamWindow: however much a client sends, so many are under way.
func TestUnwrapStreamWindow(t *testing.T) {
	d := openDoor(t)
	hold, inside := make(chan struct{}), make(chan struct{}, 500)
	d.house.set(func(h *house) {
		h.enter = func(context.Context) error { inside <- struct{}{}; <-hold; return nil }
	})
	s, err := kmspb.NewInstancesClient(d.as(t, "host/db1")).UnwrapStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w := wrapped(t, 1)
	for i := range 200 {
		if err := s.Send(&kmspb.UnwrapRequest{Tag: uint64(i), Wrapped: w}); err != nil {
			t.Fatal(err)
		}
	}
	for range 64 {
		<-inside
	}
	select {
	case <-inside:
		t.Error("a 65th unwrap is under way")
	case <-time.After(100 * time.Millisecond):
	}
	close(hold)
	tags := map[uint64]bool{}
	for range 200 {
		a, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		tags[a.GetTag()] = true
	}
	if len(tags) != 200 {
		t.Errorf("answers: got %d tags, want 200", len(tags))
	}
}

func TestUnwrapBatch(t *testing.T) {
	d := openDoor(t)
	c := kmspb.NewInstancesClient(d.as(t, "host/db1"))
	r := &kmspb.UnwrapBatchRequest{Items: []*kmspb.UnwrapRequest{
		{Tag: 9, Wrapped: wrapped(t, 1)}, {Tag: 8, Wrapped: []byte("bad")}, {Tag: 7, Wrapped: wrapped(t, 13)}, {Tag: 6, Wrapped: wrapped(t, 4)},
		{Tag: 5}, {Tag: 4, Wrapped: make([]byte, 4097)},
	}}
	resp, err := c.UnwrapBatch(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	want := []codes.Code{codes.OK, codes.InvalidArgument, codes.PermissionDenied, codes.OK, codes.InvalidArgument, codes.InvalidArgument}
	for i, item := range resp.GetItems() {
		if codes.Code(item.GetCode()) != want[i] || item.GetTag() != uint64(9-i) || (len(item.GetKey()) == 32) != (want[i] == codes.OK) {
			t.Errorf("item %d: got %v, want %v", i, item, want[i])
		}
	}
	if len(resp.GetItems()) != len(want) || resp.GetItems()[3].GetKey()[0] != 4 {
		t.Errorf("items: got %d", len(resp.GetItems()))
	}
	full := &kmspb.UnwrapBatchRequest{Items: make([]*kmspb.UnwrapRequest, 1000)}
	w := wrapped(t, 2)
	for i := range full.Items {
		full.Items[i] = &kmspb.UnwrapRequest{Tag: uint64(i), Wrapped: w}
	}
	if resp, err := c.UnwrapBatch(t.Context(), full); err != nil || len(resp.GetItems()) != 1000 {
		t.Errorf("1000 items: %v", err)
	}
}

// TestOneAnswerForBadCiphertext: whatever is wrong with a wrapped DEK, here or
// behind the door, the reply is the same, byte for byte.
func TestOneAnswerForBadCiphertext(t *testing.T) {
	d := openDoor(t)
	conn := d.as(t, "host/db1")
	ask := func(b []byte) string {
		_, s := exchange(t, conn, kmspb.Instances_Unwrap_FullMethodName, encode(t, &kmspb.UnwrapRequest{Wrapped: b}))
		return string(encode(t, s.Proto()))
	}
	d.house.set(func(h *house) { h.fail = dek.ErrAuth })
	want := ask(wrapped(t, 1))
	w := wrapped(t, 1)
	for name, b := range map[string][]byte{
		"empty": nil, "garbage": []byte("x"), "truncated": w[:len(w)-1], "extended": append(w[:len(w):len(w)], 0), "too long": make([]byte, 4097),
	} {
		if got := ask(b); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestPanicIsContained(t *testing.T) {
	d := openDoor(t)
	conn := d.as(t, "person/a")
	d.house.set(func(h *house) { h.enter = func(context.Context) error { panic("canary in the panic") } })
	for name, request := range good(t) {
		if strings.HasPrefix(name, "/grpc.health") {
			continue
		}
		replies, s := exchange(t, conn, name, encode(t, request))
		if name == kmspb.Instances_UnwrapStream_FullMethodName {
			a := new(kmspb.UnwrapResponse)
			if len(replies) != 1 || proto.Unmarshal(replies[0], a) != nil || codes.Code(a.GetCode()) != codes.Internal {
				t.Errorf("%s: got %v, %v", name, a, s)
			}
			continue
		}
		if s.Code() != codes.Internal || s.Message() != "internal error" {
			t.Errorf("%s: got %v", name, s)
		}
	}
	d.house.set(func(h *house) { h.enter = nil })
	if _, s := exchange(t, conn, kmspb.Admin_GetStatus_FullMethodName, nil); s.Code() != codes.OK {
		t.Errorf("afterwards: %v", s)
	}
}

func TestDeadlineIsTheCallers(t *testing.T) {
	d := openDoor(t)
	d.house.set(func(h *house) { h.enter = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() } })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := kmspb.NewAdminClient(d.as(t, "person/a")).GetStatus(ctx, &kmspb.GetStatusRequest{})
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v, want DeadlineExceeded", err)
	}
}

// TestLanes: a full lane turns calls away as busy and leaves the others alone.
func TestLanes(t *testing.T) {
	d := openDoor(t)
	conn := d.as(t, "person/a")
	release := d.Fill("bulk")
	if _, s := exchange(t, conn, kmspb.Admin_Backup_FullMethodName, nil); s.Code() != codes.Unavailable || reason(s) != "UNAVAILABLE" {
		t.Errorf("full lane: got %v", s)
	}
	if _, s := exchange(t, conn, kmspb.Admin_GetStatus_FullMethodName, nil); s.Code() != codes.OK {
		t.Errorf("other lane: got %v", s)
	}
	release()
	if replies, s := exchange(t, conn, kmspb.Admin_Backup_FullMethodName, nil); s.Code() != codes.OK || len(replies) != 3 {
		t.Errorf("free lane: got %d chunks, %v", len(replies), s)
	}
}

// TestShares: one caller can't hold a whole lane; what it gives back is gone
// from the books.
func TestShares(t *testing.T) {
	d := openDoor(t)
	release := d.FillShare(t, "bulk", "person/a")
	if _, s := exchange(t, d.as(t, "person/a"), kmspb.Admin_Backup_FullMethodName, nil); reason(s) != "UNAVAILABLE" {
		t.Errorf("beyond the share: got %v", s)
	}
	if _, s := exchange(t, d.as(t, "person/b"), kmspb.Admin_Backup_FullMethodName, nil); s.Code() != codes.OK {
		t.Errorf("somebody else: got %v", s)
	}
	release()
	if _, s := exchange(t, d.as(t, "person/a"), kmspb.Admin_Backup_FullMethodName, nil); s.Code() != codes.OK {
		t.Errorf("given back: got %v", s)
	}
	for d.Shares() > 0 { // the last call leaves after its reply
		if err := t.Context().Err(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStrangerLimit: a burst, then one each period, and what was left out is
// counted once.
func TestStrangerLimit(t *testing.T) {
	var h rpc.StrangerLimit
	now := time.Unix(1_800_000_000, 0)
	made := 0
	for range 24 * 3600 * 10 { // ten a second, for a day
		now = now.Add(100 * time.Millisecond)
		if ok, _ := h.Pass(now); ok {
			made++
		}
	}
	if most := rpc.StrangerBurst + int(24*time.Hour/rpc.StrangerEvery) + 1; made > most || made < most-2 {
		t.Errorf("%d records in a day, want about %d", made, most)
	}
	ok, _ := h.Pass(now.Add(time.Hour))
	if !ok {
		t.Error("refused after an hour of peace")
	}
	burst := 1
	for now = now.Add(2 * time.Hour); ; burst++ {
		if ok, _ := h.Pass(now); !ok {
			break
		}
	}
	if burst != rpc.StrangerBurst+1 {
		t.Errorf("a burst of %d, want %d", burst-1, rpc.StrangerBurst)
	}
	if ok, dropped := h.Pass(now.Add(rpc.StrangerEvery)); !ok || dropped != 1 {
		t.Errorf("then: %v with %d left out, want 1", ok, dropped)
	}
}

// TestRecordThatFails: a refusal is a refusal, whether it can be kept or not.
func TestRecordThatFails(t *testing.T) {
	d := openDoor(t)
	d.ledger.fail = dek.ErrExhausted
	if _, s := exchange(t, d.as(t, "person/a"), kmspb.Admin_GetKey_FullMethodName, nil); reason(s) != "INVALID" {
		t.Errorf("got %v", s)
	}
}

// TestStrangersCantFillTheDisk: beyond a rate, refusals are counted, not kept.
func TestStrangersCantFillTheDisk(t *testing.T) {
	d := openDoor(t)
	conn := d.dial(t, nil)
	for range 200 {
		exchange(t, conn, kmspb.Admin_GetStatus_FullMethodName, nil)
	}
	if n := len(d.ledger.take()); n == 0 || n > 100 {
		t.Errorf("records of 200 refusals: got %d, want 1 to 100", n)
	}
}

func TestCloseEndsStreams(t *testing.T) {
	d := openDoor(t)
	w := watch(t, kmspb.NewInstancesClient(d.as(t, "host/db1")))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	d.Close(ctx)
	if _, err := w.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	if ctx.Err() != nil {
		t.Error("Close waited until its context ended")
	}
}

// A tracked pool shows what buffers hold when they come back.
type tracked struct {
	mem.BufferPool
	back []byte
}

func (p *tracked) Put(b *[]byte) { p.back = append(p.back, (*b)[:cap(*b)]...) }

func TestRepliesWithKeysAreWiped(t *testing.T) {
	for _, batch := range []bool{false, true} {
		key := make([]byte, 32)
		for i := range key {
			key[i] = 0xA5
		}
		item := &kmspb.UnwrapResponse{Tag: 1, Key: key}
		var m proto.Message = item
		if batch {
			m = &kmspb.UnwrapBatchResponse{Items: []*kmspb.UnwrapResponse{item}}
		}
		pool := &tracked{BufferPool: mem.DefaultBufferPool()}
		data, err := rpc.NewCodec(pool).Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(data.Materialize()), strings.Repeat("\xa5", 32)) {
			t.Error("the encoded reply has no key")
		}
		data.Free()
		if strings.Contains(string(pool.back), "\xa5") || len(pool.back) == 0 {
			t.Errorf("batch %v: %d bytes came back, the key among them", batch, len(pool.back))
		}
		for _, b := range key {
			if b != 0 {
				t.Errorf("batch %v: the message still holds the key", batch)
				break
			}
		}
	}
}

func FuzzRequests(f *testing.F) {
	requests := good(f)
	for i, m := range rpc.Methods() {
		f.Add(i, encode(f, requests[m.Name()]))
		f.Add(i, []byte{0x0a, 0x01, '/'})
	}
	d := openDoor(f)
	conn := d.as(f, "person/a")
	table := rpc.Methods()
	f.Fuzz(func(t *testing.T, i int, request []byte) {
		m := table[uint(i)%uint(len(table))]
		replies, s := exchange(t, conn, m.Name(), request)
		switch s.Code() {
		case codes.OK, codes.PermissionDenied, codes.NotFound: // a token, a health service
		case codes.InvalidArgument:
			if len(replies) > 0 {
				t.Errorf("%s: replies and an error", m.Name())
			}
		case codes.ResourceExhausted: // gRPC's own limit
		default:
			t.Errorf("%s: got %v", m.Name(), s)
		}
		d.ledger.take()
	})
}
