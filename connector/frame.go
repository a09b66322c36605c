package connector

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/keyward/keyward/dek"
)

// The agent socket protocol, version 1. PROTOCOL.md is the document.
const (
	protocolVersion = 1
	protocolMagic   = "KWA1"

	frameHeader   = 4 + 1 + 4 // length, op, seq
	minFrame      = 5         // op and seq
	maxFrame      = 65536
	nonceSize     = 16
	maxWaitMillis = 60_000

	opHello  = 0x01
	opList   = 0x02
	opGet    = 0x03
	opWait   = 0x04
	opReport = 0x05
	opReply  = 0x80 // added to the request's op
	opError  = 0xFF
)

// A ListState is how a keyring stands, as LIST tells it.
type ListState uint8

// The states of a keyring in a LIST reply.
const (
	ListActive ListState = iota + 1
	ListDenied           // the key service said no
	ListStale            // the key service can't be reached
)

// Error classes on the socket.
const (
	classInvalid uint16 = iota + 1
	classDenied
	classUnavailable
	classNotFound
	classInternal
)

// errFrame marks bytes that are not the protocol: answer, then close.
var errFrame = fmt.Errorf("%w: malformed frame", dek.ErrInvalid)

// errInternal is class 5: a fault of the agent's own.
var errInternal = errors.New("internal error")

func socketClass(err error) uint16 {
	switch {
	case errors.Is(err, dek.ErrInvalid):
		return classInvalid
	case errors.Is(err, dek.ErrDenied):
		return classDenied
	case errors.Is(err, dek.ErrNotFound):
		return classNotFound
	case errors.Is(err, dek.ErrUnavailable):
		return classUnavailable
	}
	return classInternal
}

func socketError(class uint16) error {
	switch class {
	case classInvalid:
		return dek.ErrInvalid
	case classDenied:
		return dek.ErrDenied
	case classUnavailable:
		return dek.ErrUnavailable
	case classNotFound:
		return dek.ErrNotFound
	}
	return errInternal
}

// A ServerKey names a data key as a database server does.
type ServerKey struct {
	ID      uint32 // key id: 1 system, 2 temporary files, others per table
	Version uint32
}

// A ServerUsage says when a server last asked for a version.
type ServerUsage struct {
	ServerKey
	Last time.Time // whole seconds
}

// A ListedKeyring is one keyring of a LIST reply.
type ListedKeyring struct {
	ID       uint32 // key id
	Latest   uint32 // newest server version to encrypt with
	State    ListState
	Keyring  string   // "vault/keyring"
	Versions []uint32 // every server version, ascending
}

// hello is the body of the first request.
type hello struct {
	kind     string
	instance string // empty: the one this uid may use
	nonce    [nonceSize]byte
	cold     bool
}

// body reads one frame body. After a failed read, ok is false and every value
// is zero; end must be called last.
type body struct {
	b   []byte
	bad bool
}

func (r *body) take(n int) []byte {
	if r.bad || len(r.b) < n {
		r.bad = true
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *body) u8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *body) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *body) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *body) u64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *body) str() string { return string(r.take(int(r.u16()))) }

// end reports whether the body was exactly what was read.
func (r *body) end() error {
	if r.bad || len(r.b) != 0 {
		return errFrame
	}
	return nil
}

func parseHello(b []byte) (hello, error) {
	r := body{b: b}
	magic, version := string(r.take(4)), r.u16()
	h := hello{kind: r.str(), instance: r.str()}
	copy(h.nonce[:], r.take(nonceSize))
	cold := r.u8()
	h.cold = cold == 1
	if err := r.end(); err != nil {
		return hello{}, err
	}
	switch {
	case magic != protocolMagic || cold > 1:
		return hello{}, errFrame
	case version != protocolVersion:
		return hello{}, fmt.Errorf("%w: protocol version %d: this agent speaks %d: install plugin and agent of one release", errFrame, version, protocolVersion)
	}
	if err := dek.CheckName("kind", h.kind); err != nil {
		return hello{}, errors.Join(errFrame, err)
	}
	if h.instance != "" {
		if err := dek.CheckName("instance", h.instance); err != nil {
			return hello{}, errors.Join(errFrame, err)
		}
	}
	return h, nil
}

func parseGet(b []byte) (ServerKey, error) {
	r := body{b: b}
	k := ServerKey{ID: r.u32(), Version: r.u32()}
	return k, r.end()
}

func parseWait(b []byte) (generation uint64, timeout time.Duration, err error) {
	r := body{b: b}
	generation = r.u64()
	millis := min(r.u32(), maxWaitMillis)
	return generation, time.Duration(millis) * time.Millisecond, r.end()
}

func parseReport(b []byte) ([]ServerUsage, error) {
	r := body{b: b}
	n := int(r.u16())
	if len(r.b) != n*16 {
		return nil, errFrame
	}
	out := make([]ServerUsage, 0, n)
	for range n {
		u := ServerUsage{ServerKey: ServerKey{ID: r.u32(), Version: r.u32()}}
		at := r.u64()
		if at > 1<<40 { // year 36812: not a time
			return nil, errFrame
		}
		u.Last = time.Unix(int64(at), 0).UTC()
		out = append(out, u)
	}
	return out, r.end()
}

// beginFrame appends a header; endFrame fills in the length.
func beginFrame(out []byte, op byte, seq uint32) []byte {
	out = append(out, 0, 0, 0, 0, op)
	return binary.BigEndian.AppendUint32(out, seq)
}

func endFrame(out []byte, start int) []byte {
	binary.BigEndian.PutUint32(out[start:], uint32(len(out)-start-4)) //nolint:gosec // at most maxFrame
	return out
}

func appendString(out []byte, s string) []byte {
	if len(s) > 4096 { // far beyond any name or message of ours
		s = s[:4096]
	}
	out = binary.BigEndian.AppendUint16(out, uint16(len(s))) //nolint:gosec // checked above
	return append(out, s...)
}

func appendHello(out []byte, seq uint32, h hello) []byte {
	start := len(out)
	out = beginFrame(out, opHello, seq)
	out = append(out, protocolMagic...)
	out = binary.BigEndian.AppendUint16(out, protocolVersion)
	out = appendString(appendString(out, h.kind), h.instance)
	out = append(out, h.nonce[:]...)
	cold := byte(0)
	if h.cold {
		cold = 1
	}
	return endFrame(append(out, cold), start)
}

func appendHelloReply(out []byte, seq uint32, w Welcome) []byte {
	start := len(out)
	out = beginFrame(out, opHello|opReply, seq)
	out = appendString(appendString(out, w.Instance), w.Endpoints)
	out = binary.BigEndian.AppendUint32(out, uint32(min(w.Refresh.Milliseconds(), 1<<32-1))) //nolint:gosec // bounded
	return endFrame(out, start)
}

func appendList(out []byte, seq uint32) []byte {
	start := len(out)
	return endFrame(beginFrame(out, opList, seq), start)
}

// appendListBody appends a LIST reply's body without its generation.
func appendListBody(out []byte, list []ListedKeyring) []byte {
	out = binary.BigEndian.AppendUint16(out, uint16(len(list))) //nolint:gosec // the builder bounds it
	for _, k := range list {
		out = binary.BigEndian.AppendUint32(out, k.ID)
		out = binary.BigEndian.AppendUint32(out, k.Latest)
		out = append(out, byte(k.State))
		out = appendString(out, k.Keyring)
		out = binary.BigEndian.AppendUint16(out, uint16(len(k.Versions))) //nolint:gosec // the builder bounds it
		for _, v := range k.Versions {
			out = binary.BigEndian.AppendUint32(out, v)
		}
	}
	return out
}

func appendListReply(out []byte, seq uint32, generation uint64, listBody []byte) []byte {
	start := len(out)
	out = beginFrame(out, opList|opReply, seq)
	out = binary.BigEndian.AppendUint64(out, generation)
	return endFrame(append(out, listBody...), start)
}

func appendGet(out []byte, seq uint32, k ServerKey) []byte {
	start := len(out)
	out = beginFrame(out, opGet, seq)
	out = binary.BigEndian.AppendUint32(out, k.ID)
	return endFrame(binary.BigEndian.AppendUint32(out, k.Version), start)
}

// getReplySize is the size of a whole GET reply frame.
const getReplySize = frameHeader + 4 + 4 + 1 + dek.KeySize

// appendGetReply appends a reply with room for the key; the caller wipes out.
func appendGetReply(out []byte, seq uint32, k ServerKey, key []byte) []byte {
	start := len(out)
	out = beginFrame(out, opGet|opReply, seq)
	out = binary.BigEndian.AppendUint32(out, k.ID)
	out = binary.BigEndian.AppendUint32(out, k.Version)
	out = append(out, byte(len(key)))
	return endFrame(append(out, key...), start)
}

func appendWait(out []byte, seq uint32, generation uint64, timeout time.Duration) []byte {
	start := len(out)
	out = beginFrame(out, opWait, seq)
	out = binary.BigEndian.AppendUint64(out, generation)
	millis := max(0, min(timeout.Milliseconds(), maxWaitMillis))
	return endFrame(binary.BigEndian.AppendUint32(out, uint32(millis)), start) //nolint:gosec // bounded
}

func appendWaitReply(out []byte, seq uint32, generation uint64) []byte {
	start := len(out)
	out = beginFrame(out, opWait|opReply, seq)
	return endFrame(binary.BigEndian.AppendUint64(out, generation), start)
}

func appendReport(out []byte, seq uint32, usage []ServerUsage) []byte {
	start := len(out)
	out = beginFrame(out, opReport, seq)
	out = binary.BigEndian.AppendUint16(out, uint16(len(usage))) //nolint:gosec // the caller bounds it
	for _, u := range usage {
		out = binary.BigEndian.AppendUint32(out, u.ID)
		out = binary.BigEndian.AppendUint32(out, u.Version)
		out = binary.BigEndian.AppendUint64(out, uint64(max(0, u.Last.Unix()))) //nolint:gosec // not negative
	}
	return endFrame(out, start)
}

func appendReportReply(out []byte, seq uint32) []byte {
	start := len(out)
	return endFrame(beginFrame(out, opReport|opReply, seq), start)
}

func appendError(out []byte, seq uint32, class uint16, message string) []byte {
	start := len(out)
	out = beginFrame(out, opError, seq)
	out = binary.BigEndian.AppendUint16(out, class)
	return endFrame(appendString(out, message), start)
}
