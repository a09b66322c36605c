package recovery

import (
	"bytes"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"

	"github.com/keyward/keyward/dek"
)

const (
	sharePrefix = "kwshare1-"
	// payloadBytes are m, n, fingerprint, share and checksum: 80 characters.
	payloadBytes = 2 + setBytes + dek.KeySize + sumBytes
	payloadChars = payloadBytes * 8 / 5
	groupChars   = 5 // between two dashes, for typing
	maxShareText = 512
)

// alphabet is Crockford's base32: no letter that looks like a digit.
const alphabet = "0123456789abcdefghjkmnpqrstvwxyz"

const shareRedacted = "recovery.Share(redacted)"

// errNotSerialisable answers encoders; only Text writes a share.
var errNotSerialisable = errors.New("recovery: a share can't be serialised; use Text")

// A Share is one person's part of a recipient's private half. Its bytes lie in
// locked memory; copies of the value share them. Whoever got it from Generate
// or ParseShare destroys it. It can't be printed or encoded but by Text.
type Share struct {
	index, m, n byte
	set         setID
	y           *dek.Key
}

// Index returns the number of the share, 1 to n.
func (s Share) Index() int { return int(s.index) }

// Threshold returns m and n: how many of how many shares join.
func (s Share) Threshold() (m, n int) { return int(s.m), int(s.n) }

// Fingerprint returns that of the Recipient the share belongs to: people
// joining shares can see at once that one is from another set.
func (s Share) Fingerprint() string { return hex.EncodeToString(s.set[:]) }

// Destroy wipes the share.
func (s Share) Destroy() { s.y.Destroy() }

// Text returns the share as one line for paper: "kwshare1-", its number, and
// 16 groups of five characters, the last of which hold a checksum. The caller
// wipes it. It returns dek.ErrDestroyed after Destroy.
func (s Share) Text() ([]byte, error) {
	if s.y == nil {
		return nil, dek.ErrDestroyed
	}
	payload := make([]byte, 0, payloadBytes)
	defer func() { clear(payload[:payloadBytes]) }()
	payload = append(payload, s.m, s.n)
	payload = append(payload, s.set[:]...)
	err := s.y.Use(func(b []byte) error {
		payload = append(payload, b...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	sum := s.checksum(payload)
	payload = append(payload, sum[:]...)

	out := make([]byte, 0, len(sharePrefix)+4+payloadChars+payloadChars/groupChars)
	out = append(out, sharePrefix...)
	out = strconv.AppendUint(out, uint64(s.index), 10)
	for i := range payloadChars {
		if i%groupChars == 0 {
			out = append(out, '-')
		}
		out = append(out, encode32(payload, i))
	}
	return out, nil
}

// checksum covers the number too, which is written outside the groups.
func (s Share) checksum(payload []byte) [sumBytes]byte {
	return checksum(sharePrefix+strconv.Itoa(int(s.index))+"-", payload)
}

// ParseShare reads a share typed or scanned by a person: letters in either
// case, o for 0, i or l for 1, with any dashes and spaces between. It wraps
// dek.ErrInvalid for everything else; the text names the share by its number
// and says what is wrong without repeating a character. text is left as it
// is: the caller wipes it.
func ParseShare(text []byte) (Share, error) {
	s := Share{}
	number, body, err := cutShare(text)
	if err != nil {
		return s, fmt.Errorf("recovery share: %w", err)
	}
	s.index = number
	payload, err := decode32(body)
	defer clear(payload)
	if err == nil {
		err = s.fill(payload)
	}
	if err != nil {
		return Share{}, fmt.Errorf("recovery share %d: %w", number, err)
	}
	return s, nil
}

// cutShare takes prefix and number off text.
func cutShare(text []byte) (number byte, body []byte, err error) {
	text = bytes.TrimSpace(text)
	if len(text) > maxShareText || len(text) < len(sharePrefix) || !bytes.EqualFold(text[:len(sharePrefix)], []byte(sharePrefix)) {
		return 0, nil, fmt.Errorf("%w: want a line that begins with %s", dek.ErrInvalid, sharePrefix)
	}
	digits, body, ok := bytes.Cut(text[len(sharePrefix):], []byte("-"))
	n := 0
	for _, c := range digits {
		if n > MaxShares || c < '0' || c > '9' || c == '0' && n == 0 {
			ok = false
			break
		}
		n = n*10 + int(c-'0')
	}
	if !ok || n < 1 || n > MaxShares {
		return 0, nil, fmt.Errorf("%w: want the number of the share, 1 to %d, after %s", dek.ErrInvalid, MaxShares, sharePrefix)
	}
	return byte(n), body, nil
}

// fill checks the payload and takes it over.
func (s *Share) fill(payload []byte) error {
	payload, sum := payload[:payloadBytes-sumBytes], payload[payloadBytes-sumBytes:]
	if want := s.checksum(payload); subtle.ConstantTimeCompare(sum, want[:]) != 1 {
		return fmt.Errorf("%w: the checksum does not fit: compare every character with the paper", dek.ErrInvalid)
	}
	s.m, s.n = payload[0], payload[1]
	copy(s.set[:], payload[2:])
	if s.m < MinShares || s.n < s.m || s.index > s.n {
		return fmt.Errorf("%w: number %d of a set of %d that needs %d", dek.ErrInvalid, s.index, s.n, s.m)
	}
	y, err := dek.KeyFrom(payload[2+setBytes:])
	s.y = y
	return err
}

// Format prints a fixed text for every verb.
func (Share) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, shareRedacted) }

// LogValue logs a fixed text.
func (Share) LogValue() slog.Value { return slog.StringValue(shareRedacted) }

// MarshalText refuses: JSON, XML and other encoders get an error.
func (Share) MarshalText() ([]byte, error) { return nil, errNotSerialisable }

// GobEncode refuses, as MarshalText does.
func (Share) GobEncode() ([]byte, error) { return nil, errNotSerialisable }

// encode32 returns character i of b in base32: 5 bits, most significant first.
// The alphabet is scanned, not indexed, as b is secret.
func encode32(b []byte, i int) byte {
	bit := i * 5
	w := uint16(b[bit/8]) << 8
	if bit/8+1 < len(b) {
		w |= uint16(b[bit/8+1])
	}
	v := byte(w>>(11-bit%8)) & 31
	var c byte
	for j := range len(alphabet) {
		c |= alphabet[j] & -byte(subtle.ConstantTimeByteEq(v, byte(j)))
	}
	return c
}

// value32 returns what character c stands for, and whether it stands for
// anything, by a scan of the alphabet.
func value32(c byte) (v byte, ok bool) {
	if c >= 'A' && c <= 'Z' {
		c += 'a' - 'A'
	}
	switch c {
	case 'o':
		c = '0'
	case 'i', 'l':
		c = '1'
	}
	found := 0
	for j := range len(alphabet) {
		eq := subtle.ConstantTimeByteEq(c, alphabet[j])
		v |= byte(j) & -byte(eq)
		found |= eq
	}
	return v, found == 1
}

// decode32 reads payloadChars characters, dashes and spaces between them.
func decode32(text []byte) ([]byte, error) {
	out := make([]byte, payloadBytes)
	n := 0
	for _, c := range text {
		if c == '-' || c == ' ' || c == '\t' {
			continue
		}
		v, ok := value32(c)
		if !ok {
			return out, fmt.Errorf("%w: group %d has a character that shares do not use", dek.ErrInvalid, n/groupChars+1)
		}
		if n < payloadChars {
			w := uint16(v) << (11 - n*5%8)
			out[n*5/8] |= byte(w >> 8)
			if n*5/8+1 < len(out) {
				out[n*5/8+1] |= byte(w)
			}
		}
		n++
	}
	if n != payloadChars {
		return out, fmt.Errorf("%w: %d characters after the number, want %d", dek.ErrInvalid, n, payloadChars)
	}
	return out, nil
}
