import java.io.FileInputStream;
import java.security.cert.*;
import java.util.*;

/** Validates a chain (PEM, the device's certificate first, without the root) by PKIX up to the root, with CRLs of all CAs. */
public class Pkix {
    public static void main(String[] files) throws Exception {
        CertificateFactory factory = CertificateFactory.getInstance("X.509");
        X509Certificate root = (X509Certificate) factory.generateCertificate(new FileInputStream(files[0]));
        CertPath path = factory.generateCertPath(new ArrayList<>(factory.generateCertificates(new FileInputStream(files[1]))));
        List<CRL> crls = new ArrayList<>();
        for (int i = 2; i < files.length; i++) {
            crls.add(factory.generateCRL(new FileInputStream(files[i])));
        }
        PKIXParameters parameters = new PKIXParameters(Set.of(new TrustAnchor(root, null)));
        parameters.addCertStore(CertStore.getInstance("Collection", new CollectionCertStoreParameters(crls)));
        try {
            CertPathValidator.getInstance("PKIX").validate(path, parameters);
            System.out.println("valid");
        } catch (CertPathValidatorException error) {
            System.out.println(error.getReason());
        }
    }
}
