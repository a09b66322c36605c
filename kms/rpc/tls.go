package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/identity"
)

// A tlsPeer is one TLS connection: who is at its end, if anyone, and the way
// to end it.
type tlsPeer struct {
	credentials.TLSInfo
	identity.Peer // zero: a stranger
	conn          net.Conn
}

// stranger reports whether no certificate was shown.
func (p *tlsPeer) stranger() bool { return p.Principal == "" }

// A tlsDoor is the server side of the handshake: TLS 1.3 alone, no resumption
// (each connection proves its key again), the key exchanges of crypto/tls,
// whose first choices are hybrids with ML-KEM.
type tlsDoor struct {
	identities Identities
	metrics    *metrics
	refused    func(remote string, err error)
	strangers  *atomic.Int32 // connections without a certificate, open now
}

// Strangers need a connection for one call. These bounds keep them from
// holding memory or descriptors that hosts need.
const (
	maxStrangers = 256
	strangerLife = 2 * time.Minute
)

var _ credentials.TransportCredentials = (*tlsDoor)(nil)

func (d *tlsDoor) config() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		GetCertificate:         d.identities.ServerCertificate,
		SessionTicketsDisabled: true,
		// Whoever shows a certificate is verified below; whoever shows none
		// may enrol and ask for health, nothing else.
		ClientAuth: tls.RequestClientCert,
	}
}

// ServerHandshake implements credentials.TransportCredentials.
func (d *tlsDoor) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	peer := &tlsPeer{conn: raw}
	var denied error
	config := d.config()
	config.VerifyConnection = func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) == 0 {
			return nil
		}
		peer.Peer, denied = d.verify(s.PeerCertificates)
		return denied
	}
	conn, info, err := credentials.NewTLS(config).ServerHandshake(raw)
	switch {
	case denied != nil:
		d.metrics.handshakes.WithLabelValues("certificate refused").Inc()
		d.refused(raw.RemoteAddr().String(), denied)
		return nil, nil, denied
	case err != nil && !peer.stranger(): // a certificate of ours, and not the key to it
		d.metrics.handshakes.WithLabelValues("certificate without its key").Inc()
		d.refused(raw.RemoteAddr().String(), fmt.Errorf("%w: the certificate of %s was shown and not proved: %w", dek.ErrDenied, peer.Principal, err))
		return nil, nil, fmt.Errorf("%w: handshake: %w", dek.ErrDenied, err)
	case err != nil:
		d.metrics.handshakes.WithLabelValues("failed").Inc()
		return nil, nil, fmt.Errorf("%w: handshake: %w", dek.ErrInvalid, err)
	}
	if peer.stranger() {
		if conn, err = d.admitStranger(conn); err != nil {
			d.metrics.handshakes.WithLabelValues("too many strangers").Inc()
			return nil, nil, err
		}
	}
	d.metrics.handshakes.WithLabelValues("ok").Inc()
	peer.TLSInfo = info.(credentials.TLSInfo) //nolint:forcetypeassert // NewTLS returns nothing else
	return conn, peer, nil
}

// admitStranger counts conn and ends it after strangerLife.
func (d *tlsDoor) admitStranger(conn net.Conn) (net.Conn, error) {
	if d.strangers.Add(1) > maxStrangers {
		d.strangers.Add(-1)
		return nil, fmt.Errorf("%w: %d connections without a certificate", dek.ErrExhausted, maxStrangers)
	}
	c := &strangerConn{Conn: conn, left: func() { d.strangers.Add(-1) }}
	c.end = time.AfterFunc(strangerLife, func() { _ = c.Close() })
	return c, nil
}

// A strangerConn says when it closes.
type strangerConn struct {
	net.Conn
	once sync.Once
	left func()
	end  *time.Timer
}

// Close implements net.Conn.
func (c *strangerConn) Close() error {
	c.once.Do(c.left)
	if c.end != nil {
		c.end.Stop()
	}
	return c.Conn.Close()
}

// verify takes the leaf alone: our certificates hang directly below a root.
func (d *tlsDoor) verify(chain []*x509.Certificate) (identity.Peer, error) {
	if len(chain) > 4 {
		return identity.Peer{}, fmt.Errorf("%w: chain of %d certificates", dek.ErrDenied, len(chain))
	}
	return d.identities.Verify(chain[0])
}

// ClientHandshake implements credentials.TransportCredentials.
func (*tlsDoor) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("%w: rpc: this side serves", dek.ErrInvalid)
}

// Info implements credentials.TransportCredentials.
func (*tlsDoor) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (d *tlsDoor) Clone() credentials.TransportCredentials { c := *d; return &c }

// OverrideServerName implements credentials.TransportCredentials.
func (*tlsDoor) OverrideServerName(string) error {
	return fmt.Errorf("%w: rpc: this side serves", dek.ErrInvalid)
}
