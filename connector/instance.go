package connector

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// maxBatch is the most wrapped DEKs the service takes in one call.
const maxBatch = 1000

// An Opened is what a key service lets an instance use.
type Opened struct {
	Instance   Instance
	Keyrings   []Keyring // with wrapped DEKs
	Generation uint64    // changes whenever anything of this changes
	Checkpoint []byte    // newest audit checkpoint, to be kept and shown again
}

// OpenInstance authorises the use of an instance. Cold says that a database
// process starts with no key. Checkpoint is the newest audit checkpoint ever
// seen, or nil: a service that is behind it answers dek.ErrCorrupt. A disabled
// or revoked instance gets dek.ErrDenied.
func (c *Client) OpenInstance(ctx context.Context, instance string, cold bool, checkpoint []byte) (Opened, error) {
	req := &kmspb.OpenRequest{Instance: instance, Cold: cold, Checkpoint: checkpoint}
	m := method{op: "open instance " + instance, safety: hedged}
	resp, err := invoke(ctx, c, m, func(ctx context.Context, cc grpc.ClientConnInterface) (*kmspb.OpenResponse, error) {
		return kmspb.NewInstancesClient(cc).Open(ctx, req)
	})
	if err != nil {
		return Opened{}, err
	}
	o := Opened{Instance: instanceFrom(resp.GetInstance()), Generation: resp.GetGeneration(), Checkpoint: resp.GetCheckpoint()}
	o.Keyrings = convert(resp.GetKeyrings(), keyringFrom)
	return o, nil
}

// Unwrap returns the DEK of w; the caller destroys it. Callers that ask for
// the same one at the same time cost one call; those that ask for others while
// some calls are under way go out together in the next one, each with an
// answer of its own. A wrapped DEK that this service did not make gives
// dek.ErrAuth, a disabled or foreign one dek.ErrDenied. The end of ctx ends the
// caller's own wait only.
//
// The bytes pass through gRPC's buffers on the ordinary heap, which can't be
// wiped; the message's own copy is.
func (c *Client) Unwrap(ctx context.Context, w dek.Wrapped) (*dek.Key, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.cfg.CallTimeout)
		defer cancel()
	}
	k, err := c.flights.do(ctx, w)
	if err != nil && ctx.Err() != nil && !errors.As(err, new(*CallError)) {
		err = &CallError{Op: opUnwrap(w), Endpoint: c.Endpoints(), Class: dek.ErrUnavailable, Detail: "no answer in time", Cause: err}
	}
	return k, err
}

// keyFrom moves key bytes of a reply into locked memory.
func keyFrom(op, endpoint string, b []byte) (*dek.Key, error) {
	k, err := dek.KeyFrom(b)
	if errors.Is(err, dek.ErrInvalid) {
		return nil, &CallError{Op: op, Endpoint: endpoint, Class: dek.ErrUnavailable, Detail: "the reply holds no key: is the service of another version?"}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	return k, nil
}

// An UnwrapResult is one item of a batch: a key, which the caller destroys, or
// an error.
type UnwrapResult struct {
	Key *dek.Key
	Err error
}

// UnwrapBatch unwraps many DEKs, a thousand per call, in their order. The
// error is that of the call as a whole, and then there are no results.
func (c *Client) UnwrapBatch(ctx context.Context, ws []dek.Wrapped) ([]UnwrapResult, error) {
	results := make([]UnwrapResult, 0, len(ws))
	for start := 0; start < len(ws); start += maxBatch {
		part, err := c.unwrapPart(ctx, ws[start:min(start+maxBatch, len(ws))])
		if err != nil {
			for _, r := range results {
				r.Key.Destroy()
			}
			return nil, err
		}
		results = append(results, part...)
	}
	return results, nil
}

func (c *Client) unwrapPart(ctx context.Context, ws []dek.Wrapped) ([]UnwrapResult, error) {
	req := &kmspb.UnwrapBatchRequest{}
	for n, w := range ws {
		req.Items = append(req.Items, &kmspb.UnwrapRequest{Tag: uint64(n), Wrapped: w.Bytes()}) //nolint:gosec // an index
	}
	m := method{op: fmt.Sprintf("unwrap %d keys, first %s", len(ws), ws[0].ID()), safety: hedged}
	resp, err := invoke(ctx, c, m, func(ctx context.Context, cc grpc.ClientConnInterface) (*kmspb.UnwrapBatchResponse, error) {
		return kmspb.NewInstancesClient(cc).UnwrapBatch(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	items := resp.GetItems()
	results := make([]UnwrapResult, len(ws))
	for n, w := range ws {
		op := opUnwrap(w)
		switch {
		case len(items) != len(ws) || items[n].GetTag() != uint64(n): //nolint:gosec // an index
			results[n].Err = &CallError{Op: op, Endpoint: c.Endpoints(), Class: dek.ErrUnavailable, Detail: "the reply does not match the batch: is the service of another version?"}
		case items[n].GetCode() != 0:
			results[n].Err = &CallError{Op: op, Endpoint: c.Endpoints(), Class: classOfItem(items[n].GetCode())}
		default:
			results[n].Key, results[n].Err = keyFrom(op, c.Endpoints(), items[n].GetKey())
		}
	}
	for _, it := range items {
		clear(it.GetKey()) // of a reply that did not match
	}
	return results, nil
}

// ReportUsage tells which versions a database asked for and when. A report
// replaces the one before, so it may be repeated.
func (c *Client) ReportUsage(ctx context.Context, instance string, usage []Usage) error {
	req := &kmspb.ReportRequest{Instance: instance}
	for _, u := range usage {
		req.Usage = append(req.Usage, &kmspb.Usage{Keyring: u.Keyring, Version: uint32(u.Version), LastUnix: u.Last.Unix()})
	}
	m := method{op: "report usage of " + instance, safety: repeatable}
	_, err := invoke(ctx, c, m, func(ctx context.Context, cc grpc.ClientConnInterface) (*kmspb.ReportResponse, error) {
		return kmspb.NewInstancesClient(cc).Report(ctx, req)
	})
	return err
}

// RenewIdentity replaces the identity's certificate and key now, and the
// connections with them. A certificate that ended unrevoked may still do this
// for a time that the service decides; dek.ErrDenied means: enrol again.
func (c *Client) RenewIdentity(ctx context.Context) error {
	i := c.cfg.Identity
	key, csr, err := newRequest(i.Principal())
	if err != nil {
		return err
	}
	// Repeatable: each answer certifies the same key.
	resp, err := invoke(ctx, c, method{op: "renew " + i.Principal(), safety: repeatable}, func(ctx context.Context, cc grpc.ClientConnInterface) (*kmspb.EnrollResponse, error) {
		return kmspb.NewInstancesClient(cc).Renew(ctx, &kmspb.RenewRequest{Csr: csr})
	})
	if err != nil {
		return err
	}
	if resp.GetPrincipal() != i.Principal() {
		return fmt.Errorf("%w: renew: certified as %q instead of %q", dek.ErrAuth, resp.GetPrincipal(), i.Principal())
	}
	if err := checkRenewed(resp.GetCertificate(), c.cfg.Now()); err != nil {
		return fmt.Errorf("renew: %w", err)
	}
	if err := i.replace(key, resp, i.Principal(), i.Endpoints()); err != nil {
		return fmt.Errorf("renew: %w", err)
	}
	return c.Reconnect()
}

// RenewalDue returns when the certificate should be renewed: after a third of
// its life.
func (i *Identity) RenewalDue() time.Time {
	from, to := i.Validity()
	return from.Add(to.Sub(from) / 3)
}

// RenewIfDue renews a certificate whose time has come and reports whether it
// did. Programs that run once call it at their start.
func (c *Client) RenewIfDue(ctx context.Context) (bool, error) {
	if c.cfg.Now().Before(c.cfg.Identity.RenewalDue()) {
		return false, nil
	}
	err := c.RenewIdentity(ctx)
	return err == nil, err
}

// KeepRenewed renews the certificate at a third of its life until ctx ends. A
// failure is logged and tried again, with back-off between a minute and an
// hour; the certificate in use has two thirds of its life left then.
func (c *Client) KeepRenewed(ctx context.Context) {
	const shortest, longest = time.Minute, time.Hour
	for delay := shortest; ; {
		if !sleep(ctx, c.untilRenewal(longest)) {
			return
		}
		done, err := c.RenewIfDue(ctx)
		if err == nil {
			delay = shortest
			_, until := c.cfg.Identity.Validity()
			if done {
				c.cfg.Logger.Info("certificate renewed", "principal", c.cfg.Identity.Principal(), "until", until)
			}
			if c.untilRenewal(longest) == 0 { // or this would go round as fast as the service answers
				c.cfg.Logger.Warn("the new certificate is due for renewal already: compare the clocks of this host and the key service", "until", until)
				if !sleep(ctx, longest) {
					return
				}
			}
			continue
		}
		_, until := c.cfg.Identity.Validity()
		c.cfg.Logger.Warn("certificate not renewed", "err", err, "until", until)
		if !sleep(ctx, delay/2+jitter(delay/2)) {
			return
		}
		delay = min(delay*2, longest)
	}
}

// untilRenewal is how long to wait: never longer than limit, so that a clock
// that was set is noticed.
func (c *Client) untilRenewal(limit time.Duration) time.Duration {
	d := c.cfg.Identity.RenewalDue().Sub(c.cfg.Now())
	return max(0, min(d, limit))
}
