package audit

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyward/keyward/dek"
)

// A Checkpoint says what a log held at one moment. Its text is a C2SP
// tlog-checkpoint (https://c2sp.org/tlog-checkpoint) with four extension lines,
// in a signed note (https://c2sp.org/signed-note): FORMAT.md, "Checkpoint".
type Checkpoint struct {
	Log    string    // 32 hexadecimal digits that name the log
	Size   uint64    // records covered: sequences 1 to Size
	Root   tlog.Hash // RFC 6962 tree head
	Time   time.Time // when it was signed, by the clock of the node
	Open   uint64    // the oldest intent without an outcome; Size+1 if none
	Change uint64    // largest state change number in the records, 0 if none
	State  []byte    // state hash recorded with Change
	Text   []byte    // the signed note; empty before signing
}

const (
	originPrefix  = "keyward/audit/"
	maxCheckpoint = 8 << 10
)

// errCheckpoint is the one answer for notes that are damaged, not ours or not
// signed by a trusted key.
var errCheckpoint = fmt.Errorf("%w: audit: not a checkpoint signed by a trusted key", dek.ErrAuth)

func (c *Checkpoint) origin() string { return originPrefix + c.Log }

// body is the text that is signed.
func (c *Checkpoint) body() string {
	state := "-"
	if len(c.State) > 0 {
		state = base64.StdEncoding.EncodeToString(c.State)
	}
	return fmt.Sprintf("%s\n%d\n%s\ntime %s\nopen %d\nchange %d %s\n", c.origin(), c.Size, c.Root,
		c.Time.UTC().Format(timeLayout), c.Open, c.Change, state)
}

// parseBody reads a body and refuses every other spelling of the same content.
func parseBody(text string) (*Checkpoint, error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 7 {
		return nil, errCheckpoint
	}
	c := &Checkpoint{}
	var errs [5]error
	c.Log = strings.TrimPrefix(lines[0], originPrefix)
	c.Size, errs[0] = strconv.ParseUint(lines[1], 10, 63)
	c.Root, errs[1] = tlog.ParseHash(lines[2])
	c.Time, errs[2] = time.Parse("time "+timeLayout, lines[3])
	c.Open, errs[3] = strconv.ParseUint(strings.TrimPrefix(lines[4], "open "), 10, 64)
	change, state, _ := strings.Cut(strings.TrimPrefix(lines[5], "change "), " ")
	c.Change, errs[4] = strconv.ParseUint(change, 10, 64)
	if state != "-" {
		b, err := base64.StdEncoding.DecodeString(state)
		if err != nil {
			return nil, errCheckpoint
		}
		c.State = b
	}
	if errors.Join(errs[:]...) != nil || !validLogID(c.Log) || c.body() != text {
		return nil, errCheckpoint
	}
	return c, nil
}

func validLogID(s string) bool {
	return len(s) == 32 && strings.Trim(s, hexDigits) == ""
}

// signaturePrefix begins the algorithm part of our note keys: type 0xff of
// C2SP signed-note is for names of one's own.
const signaturePrefix = "\xffgithub.com/keyward/keyward/audit/"

// algorithm names how pub signs: SHA-256 digests, ECDSA P-256 in ASN.1 or
// RSASSA-PKCS1-v1_5.
func algorithm(pub crypto.PublicKey) (string, error) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return "ecdsa-p256-sha256", nil
		}
	case *rsa.PublicKey:
		if k.N.BitLen() >= 2048 {
			return "rsa-pkcs1v15-sha256", nil
		}
	}
	return "", fmt.Errorf("%w: audit: key of type %T can't sign checkpoints (EC P-256 or RSA from 2048 bits can)", dek.ErrInvalid, pub)
}

// keyHash identifies pub under the name of a log (C2SP signed-note, "key ID").
func keyHash(origin string, pub crypto.PublicKey) (uint32, error) {
	alg, err := algorithm(pub)
	if err != nil {
		return 0, err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return 0, fmt.Errorf("%w: audit: encode key: %w", dek.ErrInvalid, err)
	}
	sum := sha256.Sum256(append([]byte(origin+"\n"+signaturePrefix+alg+"\n"), der...))
	return binary.BigEndian.Uint32(sum[:]), nil
}

// A notary is the audit key under the name of one log. It implements
// note.Signer and note.Verifier.
type notary struct {
	origin string
	hash   uint32
	pub    crypto.PublicKey
	signer crypto.Signer
}

func newNotary(origin string, pub crypto.PublicKey, signer crypto.Signer) (*notary, error) {
	h, err := keyHash(origin, pub)
	if err != nil {
		return nil, err
	}
	return &notary{origin, h, pub, signer}, nil
}

func (n *notary) Name() string    { return n.origin }
func (n *notary) KeyHash() uint32 { return n.hash }

func (n *notary) Sign(msg []byte) ([]byte, error) {
	digest := sha256.Sum256(msg)
	return n.signer.Sign(rand.Reader, digest[:], crypto.SHA256)
}

func (n *notary) Verify(msg, sig []byte) bool {
	digest := sha256.Sum256(msg)
	switch k := n.pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, digest[:], sig)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, digest[:], sig) == nil
	}
	return false
}

// sign fills in c.Text. The signature is checked before it is used: a token
// that signs with another key would make a log nobody can verify.
func (c *Checkpoint) sign(s crypto.Signer) error {
	n, err := newNotary(c.origin(), s.Public(), s)
	if err != nil {
		return err
	}
	text, err := note.Sign(&note.Note{Text: c.body()}, n)
	if err != nil {
		return fmt.Errorf("%w: audit: sign checkpoint: %w", dek.ErrUnavailable, err)
	}
	if _, err := note.Open(text, note.VerifierList(n)); err != nil {
		return fmt.Errorf("%w: audit: the audit key's signature does not verify", dek.ErrUnavailable)
	}
	c.Text = text
	return nil
}

// ParseCheckpoint reads a signed checkpoint and verifies that one of keys
// signed it. The error wraps dek.ErrAuth whatever the cause.
func ParseCheckpoint(text []byte, keys ...crypto.PublicKey) (*Checkpoint, error) {
	body, _, ok := bytes.Cut(text, []byte("\n\n"))
	if !ok || len(text) > maxCheckpoint {
		return nil, errCheckpoint
	}
	c, err := parseBody(string(body) + "\n")
	if err != nil {
		return nil, errCheckpoint
	}
	// One key at a time: the same key given twice must not be ambiguous.
	for _, k := range keys {
		n, err := newNotary(c.origin(), k, nil)
		if err != nil {
			continue
		}
		opened, err := note.Open(text, note.VerifierList(n))
		if err == nil && opened.Text == c.body() && len(opened.UnverifiedSigs) == 0 {
			c.Text = bytes.Clone(text)
			return c, nil
		}
	}
	return nil, errCheckpoint
}

// splitNotes cuts a checkpoints file into whole notes, unverified. rest is how
// many bytes at the end are no whole note.
func splitNotes(b []byte) (notes [][]byte, rest int) {
	for len(b) > 0 {
		i := bytes.Index(b, []byte("\n\n"))
		if i < 0 {
			break
		}
		end := i + 2
		for bytes.HasPrefix(b[end:], []byte("— ")) {
			nl := bytes.IndexByte(b[end:], '\n')
			if nl < 0 {
				return notes, len(b)
			}
			end += nl + 1
		}
		if end == i+2 {
			break // no signature
		}
		notes = append(notes, b[:end:end])
		b = b[end:]
	}
	return notes, len(b)
}
