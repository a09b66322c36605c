package rpc_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"crypto/elliptic"
	"crypto/x509"

	"crypto/ecdsa"
	"crypto/rand"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/kmspb"
	"github.com/keyward/keyward/kms/rpc"
)

// good returns a request that every field check accepts, per method.
func good(t testing.TB) map[string]proto.Message {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	w := wrapped(t, 1)
	grant := &kmspb.Grant{Principal: "person/b", Role: "crypto-officer", Scope: "/vaults/v"}
	return map[string]proto.Message{
		kmspb.Enrolment_Enroll_FullMethodName:        &kmspb.EnrollRequest{Token: "one-time-token", Csr: csr},
		kmspb.Instances_Renew_FullMethodName:         &kmspb.RenewRequest{Csr: csr},
		kmspb.Instances_Open_FullMethodName:          &kmspb.OpenRequest{Instance: "db1", Cold: true},
		kmspb.Instances_Unwrap_FullMethodName:        &kmspb.UnwrapRequest{Wrapped: w},
		kmspb.Instances_UnwrapBatch_FullMethodName:   &kmspb.UnwrapBatchRequest{Items: []*kmspb.UnwrapRequest{{Wrapped: w}}},
		kmspb.Instances_UnwrapStream_FullMethodName:  &kmspb.UnwrapRequest{Wrapped: w},
		kmspb.Instances_Watch_FullMethodName:         &kmspb.WatchRequest{Instance: "db1"},
		kmspb.Instances_Report_FullMethodName:        &kmspb.ReportRequest{Instance: "db1", Usage: []*kmspb.Usage{{Keyring: "r", Version: 1}}},
		kmspb.Admin_CreateVault_FullMethodName:       &kmspb.CreateVaultRequest{Name: "v"},
		kmspb.Admin_ListVaults_FullMethodName:        &kmspb.ListVaultsRequest{},
		kmspb.Admin_CreateKey_FullMethodName:         &kmspb.CreateKeyRequest{Vault: "v", Name: "k", Bits: 2048, RequestId: "a-1"},
		kmspb.Admin_RollKey_FullMethodName:           &kmspb.RollKeyRequest{Vault: "v", Name: "k"},
		kmspb.Admin_GetKey_FullMethodName:            &kmspb.GetKeyRequest{Vault: "v", Name: "k"},
		kmspb.Admin_ListKeys_FullMethodName:          &kmspb.ListKeysRequest{Vault: "v"},
		kmspb.Admin_SetKeyEnabled_FullMethodName:     &kmspb.SetEnabledRequest{Vault: "v", Name: "k"},
		kmspb.Admin_RewrapKey_FullMethodName:         &kmspb.RewrapKeyRequest{Vault: "v", Name: "k"},
		kmspb.Admin_CreateKeyring_FullMethodName:     &kmspb.CreateKeyringRequest{Vault: "v", Name: "r", MasterKey: "k"},
		kmspb.Admin_RollKeyring_FullMethodName:       &kmspb.RollKeyringRequest{Vault: "v", Name: "r"},
		kmspb.Admin_GetKeyring_FullMethodName:        &kmspb.GetKeyringRequest{Vault: "v", Name: "r"},
		kmspb.Admin_ListKeyrings_FullMethodName:      &kmspb.ListKeyringsRequest{Vault: "v"},
		kmspb.Admin_SetKeyringEnabled_FullMethodName: &kmspb.SetEnabledRequest{Vault: "v", Name: "r"},
		kmspb.Admin_PrepareInstance_FullMethodName:   &kmspb.PrepareInstanceRequest{Kind: "mariadb", Name: "db1", Vault: "v", Keyrings: []string{"r"}},
		kmspb.Admin_ListInstances_FullMethodName:     &kmspb.ListInstancesRequest{},
		kmspb.Admin_RevokeInstance_FullMethodName:    &kmspb.RevokeInstanceRequest{Name: "db1"},
		kmspb.Admin_AddGrant_FullMethodName:          grant,
		kmspb.Admin_RemoveGrant_FullMethodName:       grant,
		kmspb.Admin_ListGrants_FullMethodName:        &kmspb.ListGrantsRequest{Principal: "person/b"},
		kmspb.Admin_CreateToken_FullMethodName:       &kmspb.CreateTokenRequest{Principal: "person/b", LifetimeSeconds: 60},
		kmspb.Admin_RevokeIdentity_FullMethodName:    &kmspb.RevokeIdentityRequest{Principal: "person/b"},
		kmspb.Admin_GetStatus_FullMethodName:         &kmspb.GetStatusRequest{},
		kmspb.Admin_Backup_FullMethodName:            &kmspb.BackupRequest{},
		kmspb.Admin_ReadAudit_FullMethodName:         &kmspb.ReadAuditRequest{Limit: 10},
		kmspb.Admin_ExportAudit_FullMethodName:       &kmspb.ExportAuditRequest{},
		healthpb.Health_Check_FullMethodName:         &healthpb.HealthCheckRequest{},
		healthpb.Health_List_FullMethodName:          &healthpb.HealthListRequest{},
		healthpb.Health_Watch_FullMethodName:         &healthpb.HealthCheckRequest{},
	}
}

func encode(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestTableIsComplete(t *testing.T) {
	policy, err := access.New()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rpc.Compile(rpc.Methods(), rpc.Descriptions(), policy); err != nil {
		t.Fatal(err)
	}
	requests := good(t)
	for i, m := range rpc.Methods() {
		if requests[m.Name()] == nil {
			t.Errorf("%s has no good request in these tests", m.Name())
		}
		edits := map[string]func(name, op *string, maxBytes *int, lane *string){
			"no row":            func(name, _ *string, _ *int, _ *string) { *name += "2" },
			"operation unknown": func(_, op *string, _ *int, _ *string) { *op = "key.export" },
			"no operation":      func(_, op *string, _ *int, _ *string) { *op = "" },
			"no size":           func(_, _ *string, maxBytes *int, _ *string) { *maxBytes = 0 },
			"no lane":           func(_, _ *string, _ *int, lane *string) { *lane = "" },
		}
		for name, edit := range edits {
			table := rpc.Methods()
			table[i].Edit(edit)
			if _, err := rpc.Compile(table, rpc.Descriptions(), policy); !errors.Is(err, dek.ErrInvalid) {
				t.Errorf("%s, %s: got %v, want dek.ErrInvalid", m.Name(), name, err)
			}
		}
		twice := append(rpc.Methods(), m)
		if _, err := rpc.Compile(twice, rpc.Descriptions(), policy); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%s twice: got %v, want dek.ErrInvalid", m.Name(), err)
		}
	}
}

// TestEveryMethodAnswers is the good case that the others edit.
func TestEveryMethodAnswers(t *testing.T) {
	d := openDoor(t)
	conn := d.as(t, "person/a")
	for name, request := range good(t) {
		replies, s := exchange(t, conn, name, encode(t, request))
		if s.Code() != codes.OK || len(replies) == 0 {
			t.Errorf("%s: got %d replies, %v", name, len(replies), s)
		}
	}
	if e := d.ledger.take(); len(e) > 0 {
		t.Errorf("the door recorded calls that the service records: %+v", e)
	}
}

// TestStrangers: without a certificate every method but two gives one and the
// same answer, good or bad request, and nothing behind the door hears of it.
func TestStrangers(t *testing.T) {
	d := openDoor(t)
	conn := d.dial(t, nil)
	var first []byte
	for _, m := range rpc.Methods() {
		if m.ForStrangers() {
			continue
		}
		for _, request := range [][]byte{encode(t, good(t)[m.Name()]), []byte("\xff\xff"), nil} {
			replies, s := exchange(t, conn, m.Name(), request)
			got := encode(t, s.Proto())
			if first == nil {
				first = got
			}
			if s.Code() != codes.Unauthenticated || reason(s) != "DENIED" || len(replies) > 0 || !bytes.Equal(got, first) {
				t.Errorf("%s: got %v, %q", m.Name(), s, reason(s))
			}
		}
	}
	if n := d.house.calls.Load(); n != 0 {
		t.Errorf("strangers reached the service %d times", n)
	}
	e := d.ledger.take()
	if len(e) == 0 || e[0].Result != "denied" || e[0].Remote == "" || e[0].Correlation != testID {
		t.Errorf("records: got %d, first %+v", len(e), e)
	}
}

func TestMalformed(t *testing.T) {
	d := openDoor(t)
	conn := d.as(t, "person/a")
	for _, m := range rpc.Methods() {
		if strings.HasPrefix(m.Name(), "/grpc.health") {
			continue
		}
		for what, request := range map[string][]byte{
			"no protobuf": []byte("\xff\xff\xff"),
			"too long":    bytes.Repeat([]byte{0x7a, 0x00}, m.MaxBytes()/2+1), // an unknown field, often
		} {
			replies, s := exchange(t, conn, m.Name(), request)
			if what == "too long" && m.Name() == kmspb.Instances_UnwrapBatch_FullMethodName {
				if s.Code() != codes.ResourceExhausted { // gRPC's own limit, and its own words
					t.Errorf("%s, %s: got %v", m.Name(), what, s)
				}
			} else if s.Code() != codes.InvalidArgument || reason(s) != "INVALID" || len(replies) > 0 {
				t.Errorf("%s, %s: got %v, %q", m.Name(), what, s, reason(s))
			}
			if e := d.ledger.take(); len(e) != 1 || e[0].Principal != "person/a" || e[0].Result != "invalid" {
				t.Errorf("%s, %s: records: got %+v, want one", m.Name(), what, e)
			}
		}
	}
	if n := d.house.calls.Load(); n != 0 {
		t.Errorf("malformed requests reached the service %d times", n)
	}
	if _, s := exchange(t, conn, "/keyward.kms.v1.Admin/Nothing", nil); s.Code() != codes.PermissionDenied {
		t.Errorf("unknown method: got %v", s)
	}
}

// badFields edits the good request of a method, a field at a time.
func badFields() map[string][]func(proto.Message) {
	long := strings.Repeat("a", 64)
	out := map[string][]func(proto.Message){}
	add := func(name string, f ...func(proto.Message)) { out[name] = append(out[name], f...) }
	set := func(field string, values ...any) []func(proto.Message) {
		var fs []func(proto.Message)
		for _, v := range values {
			fs = append(fs, func(m proto.Message) { setField(m, field, v) })
		}
		return fs
	}
	names := []any{"", "A", "-a", "a/b", "..", "a\x00", long, "a b", "é"}
	byField := map[string][]string{
		"vault": {"CreateKey", "RollKey", "GetKey", "ListKeys", "SetKeyEnabled", "RewrapKey", "CreateKeyring", "RollKeyring",
			"GetKeyring", "ListKeyrings", "SetKeyringEnabled", "PrepareInstance"},
		"name": {"CreateVault", "CreateKey", "RollKey", "GetKey", "SetKeyEnabled", "RewrapKey", "CreateKeyring", "RollKeyring",
			"GetKeyring", "SetKeyringEnabled", "PrepareInstance", "RevokeInstance"},
		"master_key": {"CreateKeyring"},
		"kind":       {"PrepareInstance"},
	}
	for field, methods := range byField {
		for _, m := range methods {
			add("/keyward.kms.v1.Admin/"+m, set(field, names...)...)
		}
	}
	for _, m := range []string{"Open", "Watch", "Report"} {
		add("/keyward.kms.v1.Instances/"+m, set("instance", names...)...)
	}
	for _, m := range []string{"CreateKey", "RollKey", "CreateKeyring", "RollKeyring", "PrepareInstance"} {
		add("/keyward.kms.v1.Admin/"+m, set("request_id", "a b", "a\n", strings.Repeat("a", 65))...)
	}
	principals := []any{"", "a", "person/", "host/A", "system/kms", "local/root", "person/a/b", "person/*"}
	for _, m := range []string{"CreateToken", "RevokeIdentity", "AddGrant", "RemoveGrant"} {
		add("/keyward.kms.v1.Admin/"+m, set("principal", principals...)...)
	}
	add(kmspb.Admin_ListGrants_FullMethodName, set("principal", principals[1:]...)...)
	for _, m := range []string{"AddGrant", "RemoveGrant"} {
		add("/keyward.kms.v1.Admin/"+m, set("role", "", "god", "Auditor", "anyone")...)
		add("/keyward.kms.v1.Admin/"+m, set("scope", "", "vaults", "/vaults", "/vaults/v/", "/vaults/../x", "/vaults/v/secrets/s")...)
	}
	add(kmspb.Admin_CreateKey_FullMethodName, set("bits", uint32(1), uint32(1024), uint32(8192))...)
	for _, m := range []string{"CreateToken", "PrepareInstance"} {
		add("/keyward.kms.v1.Admin/"+m, set("lifetime_seconds", int64(-1), int64(1)<<62, int64(31*24*3600))...)
	}
	add(kmspb.Instances_Open_FullMethodName, set("checkpoint", make([]byte, 4097), []byte{0xff})...)
	for _, m := range []string{kmspb.Enrolment_Enroll_FullMethodName, kmspb.Instances_Renew_FullMethodName} {
		add(m, set("csr", []byte{}, []byte("x"), make([]byte, 9000))...)
	}
	add(kmspb.Enrolment_Enroll_FullMethodName, set("token", "", "a b", "a\n", strings.Repeat("a", 257))...)
	add(kmspb.Admin_ReadAudit_FullMethodName, set("limit", uint32(100001))...)
	add(kmspb.Admin_ReadAudit_FullMethodName, set("after_unix", int64(-1))...)
	add(kmspb.Admin_ReadAudit_FullMethodName, set("before_unix", int64(1)<<62)...)
	add(kmspb.Admin_ReadAudit_FullMethodName, set("object", strings.Repeat("a", 257))...)
	badLists(add)
	return out
}

// badLists edits requests with lists.
func badLists(add func(name string, f ...func(proto.Message))) {
	add(kmspb.Instances_UnwrapBatch_FullMethodName,
		func(m proto.Message) { m.(*kmspb.UnwrapBatchRequest).Items = nil },
		func(m proto.Message) {
			m.(*kmspb.UnwrapBatchRequest).Items = make([]*kmspb.UnwrapRequest, 1001)
			for i := range 1001 {
				m.(*kmspb.UnwrapBatchRequest).Items[i] = &kmspb.UnwrapRequest{}
			}
		})
	add(kmspb.Instances_Report_FullMethodName,
		func(m proto.Message) { m.(*kmspb.ReportRequest).Usage[0].Version = 0 },
		func(m proto.Message) { m.(*kmspb.ReportRequest).Usage[0].Keyring = "../r" },
		func(m proto.Message) { m.(*kmspb.ReportRequest).Usage[0].LastUnix = -1 })
	add(kmspb.Admin_PrepareInstance_FullMethodName,
		func(m proto.Message) { m.(*kmspb.PrepareInstanceRequest).Keyrings = nil },
		func(m proto.Message) { m.(*kmspb.PrepareInstanceRequest).Keyrings = []string{"r", "r"} },
		func(m proto.Message) { m.(*kmspb.PrepareInstanceRequest).Keyrings = []string{"R"} },
		func(m proto.Message) { m.(*kmspb.PrepareInstanceRequest).Keyrings = make([]string, 65) })
}

func TestBadFields(t *testing.T) {
	d := openDoor(t)
	conn := d.as(t, "person/a")
	n := 0
	for name, edits := range badFields() {
		for i, edit := range edits {
			request := proto.Clone(good(t)[name])
			edit(request)
			replies, s := exchange(t, conn, name, lenient(request))
			if s.Code() != codes.InvalidArgument || reason(s) != "INVALID" || len(replies) > 0 {
				t.Errorf("%s, edit %d, %v: got %v, %d replies", name, i, request, s, len(replies))
			}
			if e := d.ledger.take(); len(e) != 1 || e[0].Phase != 3 || e[0].Correlation != testID {
				t.Errorf("%s, edit %d: records: got %+v, want one refusal", name, i, e)
			}
			n++
		}
	}
	if d.house.calls.Load() != 0 || n < 250 {
		t.Errorf("of %d bad requests %d reached the service", n, d.house.calls.Load())
	}
}

// TestErrorTable walks every class through every method: one code and reason,
// the class's words alone unless the table says that they may be explained,
// and never the inside of an error.
func TestErrorTable(t *testing.T) {
	d := openDoor(t)
	conn := d.as(t, "person/a")
	rows := append(rpc.Classes(), rpc.Row{Err: errors.New("secret detail"), Code: uint32(codes.Internal), Reason: "INTERNAL"})
	codesOf := map[string]uint32{}
	for _, row := range rows {
		codesOf[row.Reason] = row.Code
		d.house.set(func(h *house) { h.fail = fmt.Errorf("open /var/lib/secret: %w\n: canary", row.Err) })
		for name, request := range good(t) {
			if strings.HasPrefix(name, "/grpc.health") {
				continue
			}
			replies, s := exchange(t, conn, name, encode(t, request))
			if name == kmspb.Instances_UnwrapStream_FullMethodName {
				item := new(kmspb.UnwrapResponse)
				if len(replies) != 1 || proto.Unmarshal(replies[0], item) != nil || item.GetCode() != row.Code || len(item.GetKey()) > 0 {
					t.Errorf("%s, %s: got %v, %v", name, row.Reason, replies, s)
				}
				continue
			}
			if uint32(s.Code()) != row.Code || reason(s) != row.Reason || len(replies) > 0 {
				t.Errorf("%s, %v: got %v %q, want code %d %q", name, row.Err, s, reason(s), row.Code, row.Reason)
			}
			if strings.Contains(s.Message(), "canary") != row.Explain || strings.Contains(s.Message(), "\n") || strings.Contains(s.Message(), "secret detail") {
				t.Errorf("%s, %v: words %q", name, row.Err, s.Message())
			}
		}
	}
	for reason, code := range codesOf {
		for other, c := range codesOf {
			// The one pair that shares a code on purpose besides INTERNAL: what is
			// no wrapped DEK of ours and what is no wrapped DEK at all.
			if reason < other && c == code && reason+other != "AUTHINVALID" && reason+other != "DESTROYEDINTERNAL" {
				t.Errorf("%s and %s share code %v", reason, other, codes.Code(c))
			}
		}
	}
}
